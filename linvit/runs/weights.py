"""Read weights from a run, folder or file, and fit them to a model with another image size or other classes."""

import argparse
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import clean_state_dict, model_entrypoint
from torch import Tensor

from linvit.model.build import TimmModel
from linvit.model.description import CONFIG, ModelDescription, parse_config, read_json, validated
from linvit.output.files import parse_json, reason
from linvit.output.terminal import note, printable
from linvit.runs.checkpoint import is_checkpoint, read_checkpoint
from linvit.runs.layouts import to_timm, wrap_like
from linvit.runs.lora import merge_adapters
from linvit.runs.positions import match_prefix, source_size
from linvit.settings.fields import Side, listed

# In order of preference.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth")
# If a model has another width or layout, nearly all its parameters differ.
MAX_SHAPES_LISTED = 3
MAX_NAMES_LISTED = 6
# Where training checkpoints keep weights, in order of preference: timm and Lightning, MAE, DINO, I-JEPA.
_STATE_DICTS = ("state_dict", "model", "teacher", "encoder")

# Files that `linvit.runtimes` opens.
EXPORTED = (".onnx", ".pt2", ".xml")
_DAMAGED = "it is damaged, or not a checkpoint of PyTorch"
_SAVE = "save model.state_dict()"


@dataclass(frozen=True)
class SavedWeights:
    """A state dict under timm's names and what its file records about the model; None for what it does not record.

    Attributes:
        path: the file or checkpoint.
        img_size: (height, width) of the model's input.
        description: the model. Only config.json of timm and checkpoints written by linvit describe it.
        settings: settings of the run that saved the weights, as in args.yaml.
    """

    path: Path
    state_dict: dict[str, Tensor]
    img_size: tuple[int, int] | None = None
    class_names: list[str] | None = None
    description: ModelDescription | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class _Recorded(BaseModel):
    """The record of the model in a checkpoint written by linvit."""

    arch: str
    model_args: dict[str, Any]
    img_size: tuple[Side, Side] | None = None
    class_names: list[str] | None = None
    settings: dict[str, Any] = {}


def read_weights(source: Path, *, use_ema: bool = True) -> SavedWeights:
    """Read the weights of a run (the best), a folder with config.json, a checkpoint or a file, with tensors on the CPU.

    Weights in the layout of Lightning, Hugging Face, torchvision, DINO or MAE get timm's names (`linvit.runs.layouts`).

    Args:
        source: the run, folder or checkpoint, or a .safetensors, .pth, .pt or .bin file.
        use_ema: read the EMA weights of a training checkpoint that has both.

    Raises:
        ValueError: if there are no weights, they cannot be read, or are not finite.
    """
    folder = source / "best" if (source / "best").is_dir() else source
    if folder.is_dir() and not is_checkpoint(folder):
        return _read_folder(folder, use_ema=use_ema)
    if not source.exists():
        raise ValueError(f"{source}: there is no such file or folder to take weights from")
    if source.suffix.lower() in EXPORTED:
        raise ValueError(f"{source} is an exported model, without weights to read: give the run that it came from")
    if not source.is_dir() and not source.is_file():
        raise ValueError(f"{source} is not a regular file: give a file with weights")
    checkpoint = read_checkpoint(source) if source.is_dir() else _read_file(source)
    state_dict = _state_dict(source, checkpoint, use_ema=use_ema)
    if source.suffix == ".safetensors" and (config := _header_config(source)) is not None:
        return _described(source, config, state_dict)
    if not {"arch", "model_args"} <= checkpoint.keys():
        return SavedWeights(source, state_dict, img_size=_timm_size(checkpoint.get("args")))
    recorded = validated(
        source, _Recorded, {name: value for name, value in checkpoint.items() if name in _Recorded.model_fields}
    )
    if recorded.settings.get("lora") is not None:
        state_dict = merge_adapters(state_dict, path=source)
    return SavedWeights(
        source,
        state_dict,
        img_size=recorded.img_size,
        class_names=recorded.class_names,
        description=ModelDescription(str(source), recorded.arch, recorded.model_args),
        settings=recorded.settings,
    )


def _timm_size(arguments: object) -> tuple[int, int] | None:
    """(height, width) of the images in the arguments of timm's train.py, which its checkpoints contain."""
    size, square = getattr(arguments, "input_size", None), getattr(arguments, "img_size", None)
    sides = list(size[1:]) if isinstance(size, list | tuple) else [square, square]
    whole = [side for side in sides if isinstance(side, int) and side > 0]
    return (whole[0], whole[1]) if len(sides) == len(whole) == 2 else None


def weights_file(folder: Path) -> Path:
    """The weights file in a folder that timm loads as `local-dir:`; raises ValueError for any other folder."""
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None or not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is neither a run nor a folder with config.json and {WEIGHT_FILES[0]}")
    return file


def _read_folder(folder: Path, *, use_ema: bool) -> SavedWeights:
    file = weights_file(folder)
    config = read_json(folder / CONFIG)
    state_dict = _state_dict(file, _read_file(file), use_ema=use_ema)
    if "architecture" in config:
        return replace(_described(folder / CONFIG, config, state_dict), path=file)
    # Hugging Face's own config.json.
    size = config.get("image_size")
    return SavedWeights(file, state_dict, img_size=(size, size) if isinstance(size, int) else None)


def _described(source: Path, config: dict[str, Any], state_dict: dict[str, Tensor]) -> SavedWeights:
    """Weights with the contents of timm's config.json, which `source` holds."""
    description = parse_config(source, config)
    # A run's own settings replace the input range.
    settings = recorded_range(config)
    return SavedWeights(source, state_dict, description.img_size, description.class_names, description, settings)


def recorded_range(config: dict[str, Any]) -> dict[str, Any]:
    """The input range in linvit's entry of a config.json, since timm's format has no place for it, as a setting."""
    about = config.get("linvit")
    return {"input_range": about["input_range"]} if isinstance(about, dict) and "input_range" in about else {}


def _header_config(path: Path) -> dict[str, Any] | None:
    """The config.json in the header of a .safetensors file that `linvit export` wrote; None if there is none."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("linvit")
    try:
        config = None if text is None else parse_json(text)
    except ValueError:
        config = None
    return {name: value for name, value in config.items() if value is not None} if isinstance(config, dict) else None


def _read_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # timm's training checkpoints contain their arguments as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from error
    # What a damaged file raises depends on the byte.
    except Exception as error:
        if "TorchScript" in str(error):
            why = "it is a TorchScript archive"
        elif path.suffix == ".safetensors" or isinstance(error, OSError | MemoryError):
            why = printable(reason(error))
        else:
            why = _DAMAGED
        raise ValueError(f"{path} cannot be read as weights: {why}") from error


def _refusal(path: Path, error: pickle.UnpicklingError) -> ValueError:
    """A sentence on a pickle that is damaged or holds more than tensors, without torch's advice to unpickle it."""
    refused = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", str(error))
    if refused is None:
        return ValueError(f"{path} cannot be read as weights: {_DAMAGED}")
    refusal = ValueError(
        f"{path} holds objects of {refused[1]} and not only tensors; loading these can run code; if you trust whoever "
        "made the file, save its weights alone in Python, then use weights.pth:"
    )
    refusal.add_note(f"    import torch; saved = torch.load({str(path)!r}, map_location='cpu', weights_only=False)")
    refusal.add_note("    torch.save(saved.get('state_dict', saved.get('model', saved)), 'weights.pth')")
    return refusal


def _state_dict(path: Path, checkpoint: Any, *, use_ema: bool) -> dict[str, Tensor]:
    """The weights in a checkpoint under timm's names. Raises ValueError if there are none, or they are not finite."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not weights by name: {_SAVE}")
    averaged = ("state_dict_ema", "model_ema") if use_ema else ()
    key = next((key for key in (*averaged, *_STATE_DICTS) if checkpoint.get(key) is not None), None)
    if key is None:
        # Such as "model_state_dict" beside "optimizer_state_dict".
        inner = [name for name, value in checkpoint.items() if _is_state_dict(value)]
        key = inner[0] if len(inner) == 1 else None
    weights = checkpoint if key is None else checkpoint[key]
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{path} holds no weights by name: {_SAVE}")
    for name, tensor in weights.items():
        if not _is_dense(tensor):
            kind = "is of type " + type(tensor).__name__ if not isinstance(tensor, Tensor) else "is not a dense tensor"
            raise ValueError(f"{path} holds no weights by name: its entry {printable(name)!r} {kind}; {_SAVE}")
    check_finite(weights, path=path)
    renamed = to_timm(clean_state_dict(weights), path=path, use_ema=use_ema)
    if not renamed:
        raise ValueError(f"{path} holds no weights of a model: {_SAVE}")
    return renamed


def _is_state_dict(value: object) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and _is_dense(tensor) for name, tensor in value.items())


def _is_dense(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_complex() or value.is_quantized)
    )


def check_finite(weights: Mapping[str, Tensor], *, path: Path | str) -> None:
    """Raise ValueError, naming the parameters, if weights are NaN or infinite."""
    floating = {name: value for name, value in weights.items() if value.is_floating_point()}
    # torch has no `isfinite` for floats of one byte.
    wrong = [
        name
        for name, value in floating.items()
        if not (value if value.itemsize > 1 else value.float()).isfinite().all()
    ]
    if wrong:
        names = printable(compact(wrong, most=3))
        raise ValueError(f"{path} has weights that are NaN or infinite ({names}): use weights that were saved before")


def fit_weights(model: TimmModel, saved: SavedWeights, *, class_names: Sequence[str] | None = None) -> list[str]:
    """Load weights of a model that may have another image size, patch size or classes.

    The model's own `checkpoint_filter_fn` adapts sizes. The classifier keeps its new weights if the number of classes
    or their names differ; E and F keep theirs if the weights are of a plain ViT, which has neither.

    Args:
        class_names: the classes of a model that is to be trained; None if the weights are used as they are.

    Returns:
        The names of the parameters that keep their new weights.

    Raises:
        ValueError: naming the parameters, if others are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    classifier = classifier_parameters(model)
    saved = replace(saved, state_dict=wrap_like(own, saved.state_dict))
    state_dict = dict(saved.state_dict)
    if _has_other_classes(saved, own, classifier, class_names):
        for name in classifier:
            state_dict.pop(name, None)
    fitted = _adapt(model, saved, state_dict, is_trained=class_names is not None)
    # New parameters are those that the file lacks and the filter took from the model itself.
    filled = [name for name in fitted if name not in state_dict and name in own and _same(fitted[name], own[name])]
    headless = [name for name in classifier if name not in fitted]
    if (own.keys() & fitted.keys()) <= set(filled):
        raise ValueError(
            f"{saved.path} does not fit {_architecture(model)}: its layout is unknown, with parameters such as "
            f"{printable(compact(list(saved.state_dict), most=3))}; rename them to the model's, such as "
            f"{compact(list(own), most=3)}"
        )
    load_exactly(model, {**fitted, **{name: own[name] for name in headless}}, path=saved.path)
    return sorted([*filled, *headless])


def _adapt(
    model: TimmModel, saved: SavedWeights, state_dict: dict[str, Tensor], *, is_trained: bool
) -> dict[str, Tensor]:
    """The weights with the model's prefix tokens, patch size and grid."""
    try:
        if is_trained and "head_dist.weight" not in model.state_dict():
            # The classifier of DeiT's distillation token; the one of the class token is a classifier by itself.
            state_dict = {name: tensor for name, tensor in state_dict.items() if not name.startswith("head_dist.")}
        state_dict = match_prefix(model, state_dict, saved.img_size)
        size, assumed = source_size(model, state_dict, saved.img_size)
        if assumed is not None and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            note(f"{saved.path}: {assumed}")
        if size is not None:
            # timm's filter looks there for the grid of the weights.
            model.pretrained_model_args = {"img_size": size}
        return _checkpoint_filter(model)(dict(state_dict), model)
    except (ValueError, RuntimeError, AssertionError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{saved.path} does not fit {_architecture(model)}: {printable(reason(error))}") from error


def load_exactly(model: TimmModel, state_dict: dict[str, Tensor], *, path: Path) -> None:
    """Load weights without adapting them; raises ValueError, naming the parameters, if they do not fit the model."""
    own = model.state_dict()
    state_dict = wrap_like(own, state_dict)
    missing = own.keys() - state_dict.keys()
    unexpected = state_dict.keys() - own.keys()
    reshaped = sorted(name for name in own.keys() & state_dict.keys() if own[name].shape != state_dict[name].shape)
    more = len(reshaped) - MAX_SHAPES_LISTED
    problems = [
        *([f"it lacks {compact(missing, most=MAX_NAMES_LISTED)}"] if missing else []),
        *(
            [f"it has unexpected parameters {printable(compact(unexpected, most=MAX_NAMES_LISTED))}"]
            if unexpected
            else []
        ),
        *(
            f"the shape of {name} is {_shape(state_dict[name])}, not {_shape(own[name])}"
            for name in reshaped[:MAX_SHAPES_LISTED]
        ),
        *([f"{more} more shapes differ"] if more > 0 else []),
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit {_architecture(model)}: {'; '.join(problems)}; choose the model and the model "
            "arguments that the weights were saved with"
        )
    model.load_state_dict(state_dict)


def classifier_parameters(model: TimmModel) -> list[str]:
    """Names of the parameters of the model's classifier."""
    modules = model.pretrained_cfg["classifier"] or ()
    modules = (modules,) if isinstance(modules, str) else modules
    return [name for name in model.state_dict() if name.rpartition(".")[0] in modules]


def compact(names: Iterable[str], *, most: int | None = None) -> str:
    """Parameter names on one line, with the numbers of layers merged, such as blocks.0-3,5.norm1.weight.

    After `most` of them, the number of the others follows: "a, b and 3 more".
    """
    numbers: dict[str, list[int | None]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name[: number.start()] + "{}" + name[number.end() :] if number else name
        numbers.setdefault(pattern, []).append(int(number.group()) if number else None)
    merged = [
        pattern.replace("{}", _ranges(sorted(layer for layer in layers if layer is not None)))
        for pattern, layers in sorted(numbers.items())
    ]
    return listed(merged, most=most or len(merged))


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
        name in saved.state_dict and saved.state_dict[name].shape[:1] != own[name].shape[:1] for name in classifier
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
