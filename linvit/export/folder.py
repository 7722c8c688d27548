"""Write weights without a graph: timm's `local-dir:` folder with a model card, or one `.safetensors` file.

The file's header holds the contents of config.json, so that `linvit eval FILE` needs nothing else.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from linvit.data.augment.build import InputSpec
from linvit.export.card import Origin, model_card, recorded
from linvit.export.graph import DTYPES
from linvit.model.description import CONFIG
from linvit.output.files import write_text
from linvit.runs.folder import Classifier, save_classifier
from linvit.runtimes.metadata import KEY, Precision
from linvit.version import __version__


def write_folder(
    classifier: Classifier,
    folder: Path,
    spec: InputSpec,
    origin: Origin,
    *,
    precision: Precision,
    is_on_hub: bool = False,
) -> None:
    """Write config.json, model.safetensors and README.md."""
    _save(classifier, folder, spec, precision)
    write_text(folder / "README.md", model_card(classifier, spec, origin, is_on_hub=is_on_hub))


def write_safetensors(classifier: Classifier, path: Path, spec: InputSpec, *, precision: Precision) -> None:
    """Write the weights with the contents of config.json in the header."""
    with TemporaryDirectory(dir=path.parent) as scratch:
        folder = Path(scratch) / "weights"
        _save(classifier, folder, spec, precision)
        metadata = {"format": "pt", KEY: (folder / CONFIG).read_text()}
        path.write_bytes(save(load_file(folder / "model.safetensors"), metadata))


def _save(classifier: Classifier, folder: Path, spec: InputSpec, precision: Precision) -> None:
    about: dict[str, Any] = {"version": __version__, **recorded(classifier)}
    about.pop("input_range", None)
    # timm writes `label_names` for known classes only.
    names = classifier.class_names or [str(label) for label in range(classifier.model.num_classes)]
    weights = {name: _cast(tensor, DTYPES[precision]) for name, tensor in classifier.model.state_dict().items()}
    save_classifier(folder, classifier.model, weights, class_names=names, spec=spec, about=about)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
