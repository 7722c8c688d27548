"""What predictions depend on: the images, the weights and the options; so that parts of two runs are never mixed."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from linvit.data.sources.base import PackedStrings
from linvit.output.files import json_text, parse_json, sha256_of
from linvit.prediction.predictor import Predictor
from linvit.runs.folder import Classifier
from linvit.runtimes.model import ExportedModel

# Options whose value is a digest.
_DIGESTS = ("class_names", "conformal_rule")


class Images(BaseModel):
    """The number of images, and a digest of their absolute paths in order; changed contents are not noticed."""

    model_config = ConfigDict(frozen=True)

    count: int
    sha256: str


class Model(BaseModel):
    """Where the weights come from, and a digest of the architecture, the weights and extra arguments.

    That of an exported model is of its file.
    """

    model_config = ConfigDict(frozen=True)

    weights: str
    sha256: str


class Identity(BaseModel):
    """What the rows of a run depend on; the device and the batch size change no more than rounding."""

    model_config = ConfigDict(frozen=True)

    images: Images
    model: Model
    options: dict[str, Any]

    def changes(self, now: "Identity") -> list[str]:
        """What differs in another run, in words."""
        found = []
        if self.images.count != now.images.count:
            found.append(f"{self.images.count:,} images, now {now.images.count:,}")
        elif self.images != now.images:
            found.append("other images")
        # The same weights may lie elsewhere.
        if self.model.sha256 != now.model.sha256:
            found.append("other weights")
        for name in sorted(self.options.keys() | now.options.keys()):
            before, after = self.options.get(name), now.options.get(name)
            if before != after:
                found.append(f"other {name.replace('_', ' ')}" if name in _DIGESTS else f"{name} {before}, now {after}")
        return found


def identify(
    images: PackedStrings, classifier: Classifier, predictor: Predictor, *, model_kwargs: dict[str, Any]
) -> Identity:
    """The identity of a run.

    Args:
        model_kwargs: extra arguments that the model was built with.
    """
    return Identity(
        images=Images(count=len(images), sha256=_digest(os.fsencode(os.path.abspath(path)) for path in images)),
        model=Model(weights=classifier.weights, sha256=_model_digest(classifier, model_kwargs)),
        # As they are after a round trip through a file.
        options=parse_json(json_text(predictor.settings())),
    )


def _model_digest(classifier: Classifier, model_kwargs: dict[str, Any]) -> str:
    if isinstance(classifier.model, ExportedModel):
        return _digest(sha256_of(file).encode() for file in _exported_files(Path(classifier.weights)))
    model = classifier.model
    # Buffers that are not saved, such as random projections, matter as well.
    tensors = [*model.named_parameters(), *model.named_buffers()]
    architecture = model.pretrained_cfg.get("architecture")
    digest = hashlib.sha256(json_text([architecture, model_kwargs], indent=None).encode())
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        # Through bytes, because NumPy has no bfloat16.
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _exported_files(path: Path) -> list[Path]:
    """The file of a model, or OpenVINO's two files in a folder; with weights kept beside an ONNX file."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in (".xml", ".bin"))
    beside = (path.with_suffix(".bin"), path.with_name(f"{path.name}.data"))
    return [path, *(file for file in beside if file.is_file())]


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        # A path cannot contain a zero byte.
        digest.update(part + b"\0")
    return digest.hexdigest()
