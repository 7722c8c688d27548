"""Read weights from a run, folder or file, and fit them to a model with another image size or other classes."""

import argparse
import json
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict, model_entrypoint
from torch import Tensor

from linvit.model.build import TimmModel
from linvit.output.files import reason
from linvit.runs.checkpoint import is_checkpoint, read_checkpoint

# In order of preference.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth")
# If a model has another width, nearly all its parameters differ in shape.
MAX_SHAPES_LISTED = 3


@dataclass(frozen=True)
class SavedWeights:
    """A state dict and what its file records about the model; None for what it does not record.

    Attributes:
        path: the file or checkpoint.
        img_size: (height, width) of the model's input.
        architecture: timm name of the model.
        model_args: arguments of the model.
        settings: settings of the run that saved the weights, as in args.yaml.
    """

    path: Path
    state_dict: dict[str, Tensor]
    img_size: tuple[int, int] | None = None
    class_names: list[str] | None = None
    # Only checkpoints written by linvit provide the following.
    architecture: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def read_weights(source: Path, *, use_ema: bool = True) -> SavedWeights:
    """Read the weights of a run (the best), a folder with config.json, a checkpoint or a file, with tensors on the CPU.

    Args:
        source: the run, folder or checkpoint, or a .safetensors, .pth, .pt or .bin file.
        use_ema: read the EMA weights of a training checkpoint that has both.

    Raises:
        ValueError: if there are no weights, or they cannot be read.
    """
    folder = source / "best" if (source / "best").is_dir() else source
    if folder.is_dir() and not is_checkpoint(folder):
        return _read_folder(folder)
    if not source.exists():
        raise ValueError(f"{source}: there is no such file or folder to take weights from")
    checkpoint = read_checkpoint(source) if source.is_dir() else _read_file(source)
    averaged = ("state_dict_ema", "model_ema") if use_ema else ()
    key = next((key for key in (*averaged, "state_dict", "model") if checkpoint.get(key) is not None), None)
    if key is None:
        return SavedWeights(source, clean_state_dict(checkpoint))
    state_dict = clean_state_dict(checkpoint[key])
    if "model_args" not in checkpoint:
        return SavedWeights(source, state_dict)
    return SavedWeights(
        source,
        state_dict,
        img_size=checkpoint["img_size"],
        class_names=checkpoint["class_names"],
        architecture=checkpoint["arch"],
        model_args=checkpoint["model_args"],
        settings=checkpoint["settings"],
    )


def weights_file(folder: Path) -> Path:
    """The weights file in a folder that timm loads as `local-dir:`; raises ValueError for any other folder."""
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None or not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is neither a run nor a folder with config.json and {WEIGHT_FILES[0]}")
    return file


def _read_folder(folder: Path) -> SavedWeights:
    file = weights_file(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config.get("model_args", {}).get("img_size")
    size = size or config.get("pretrained_cfg", {}).get("input_size", (None,))[1:]
    return SavedWeights(
        file,
        clean_state_dict(_read_file(file)),
        img_size=(size, size) if isinstance(size, int) else tuple(size) or None,
        class_names=config.get("label_names"),
    )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # timm's training checkpoints contain their arguments as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as weights: {reason(error)}") from error


def fit_weights(model: TimmModel, saved: SavedWeights, *, class_names: Sequence[str] | None = None) -> list[str]:
    """Load weights of a model that may have another image size, patch size or classes.

    The model's own `checkpoint_filter_fn` adapts sizes. The classifier keeps its new weights if the number of classes
    or their names differ; E and F keep theirs if the weights are of a plain ViT, which has neither.

    Returns:
        The names of the parameters that keep their new weights.

    Raises:
        ValueError: naming the parameters, if others are missing, unexpected or of another shape.
    """
    state_dict = dict(saved.state_dict)
    own = model.state_dict()
    classifier = classifier_parameters(model)
    if _has_other_classes(saved, own, classifier, class_names):
        for name in classifier:
            state_dict.pop(name, None)
    if saved.img_size is not None:
        # timm's filter looks there for the grid of the weights.
        model.pretrained_model_args = {"img_size": saved.img_size}
    fitted = _checkpoint_filter(model)(dict(state_dict), model)
    # New parameters are those that the file lacks and the filter took from the model itself.
    filled = [name for name in fitted if name not in state_dict and name in own and _same(fitted[name], own[name])]
    headless = [name for name in classifier if name not in fitted]
    load_exactly(model, {**fitted, **{name: own[name] for name in headless}}, path=saved.path)
    return sorted([*filled, *headless])


def load_exactly(model: TimmModel, state_dict: dict[str, Tensor], *, path: Path) -> None:
    """Load weights without adapting them; raises ValueError, naming the parameters, if they do not fit the model."""
    own = model.state_dict()
    missing = own.keys() - state_dict.keys()
    unexpected = state_dict.keys() - own.keys()
    reshaped = sorted(name for name in own.keys() & state_dict.keys() if own[name].shape != state_dict[name].shape)
    more = len(reshaped) - MAX_SHAPES_LISTED
    problems = [
        *([f"it lacks {compact(missing)}"] if missing else []),
        *([f"it has unexpected parameters {compact(unexpected)}"] if unexpected else []),
        *(
            f"the shape of {name} is {_shape(state_dict[name])}, not {_shape(own[name])}"
            for name in reshaped[:MAX_SHAPES_LISTED]
        ),
        *([f"{more} more shapes differ"] if more > 0 else []),
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit {_architecture(model)}: {'; '.join(problems)}. Choose the model and the model "
            "arguments that the weights were saved with"
        )
    model.load_state_dict(state_dict)


def classifier_parameters(model: TimmModel) -> list[str]:
    """Names of the parameters of the model's classifier."""
    modules = model.pretrained_cfg["classifier"] or ()
    modules = (modules,) if isinstance(modules, str) else modules
    return [name for name in model.state_dict() if name.rpartition(".")[0] in modules]


def compact(names: Sequence[str] | set[str]) -> str:
    """Parameter names on one line, with the numbers of layers merged, such as blocks.0-3,5.norm1.weight."""
    numbers: dict[str, list[int | None]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name[: number.start()] + "{}" + name[number.end() :] if number else name
        numbers.setdefault(pattern, []).append(int(number.group()) if number else None)
    return ", ".join(
        pattern.format(_ranges(sorted(layer for layer in layers if layer is not None)))
        for pattern, layers in sorted(numbers.items())
    )


def _ranges(layers: list[int]) -> str:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _has_other_classes(
    saved: SavedWeights, own: dict[str, Tensor], classifier: list[str], class_names: Sequence[str] | None
) -> bool:
    if saved.class_names is not None and class_names is not None and list(class_names) != list(saved.class_names):
        return True
    return any(
        name in saved.state_dict and saved.state_dict[name].shape[0] != own[name].shape[0] for name in classifier
    )


def _checkpoint_filter(model: TimmModel) -> Callable[[dict[str, Tensor], TimmModel], dict[str, Tensor]]:
    """The `checkpoint_filter_fn` of the module that defines the model, which is where timm keeps it."""
    module = sys.modules[model_entrypoint(_architecture(model)).__module__]
    return getattr(module, "checkpoint_filter_fn", lambda state_dict, model: state_dict)


def _architecture(model: TimmModel) -> str:
    return str(model.pretrained_cfg["architecture"])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a scalar"
