"""What predictions depend on: the images, the weights and the options; so that parts of two runs are never mixed."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from linvit.data.sources.base import PackedStrings
from linvit.model.description import model_digest
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
    """Where the weights come from, and a digest of the architecture, its arguments and the weights.

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


def identify(images: PackedStrings, classifier: Classifier, predictor: Predictor) -> Identity:
    """The identity of a run."""
    return Identity(
        images=Images(count=len(images), sha256=_digest(os.fsencode(os.path.abspath(path)) for path in images)),
        model=Model(weights=classifier.weights, sha256=_model_digest(classifier)),
        # As they are after a round trip through a file.
        options=parse_json(json_text(predictor.settings())),
    )


def _model_digest(classifier: Classifier) -> str:
    if isinstance(classifier.model, ExportedModel):
        return _digest(sha256_of(file).encode() for file in _exported_files(Path(classifier.weights)))
    return model_digest(classifier.model)


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
