"""Reading models from config.json: architecture, arguments and preprocessing, all of them plain data.

timm's factory also accepts addresses to fetch weights from, folders to write to and loaders to call. None of these is
ever taken from a file or from `--model-kwargs`. A model argument is accepted if it is plain data
and a parameter of a class in the module that defines the model.
"""

import functools
import hashlib
import inspect
import json
import math
import sys
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from timm.models import build_model_with_cfg, get_model_args, model_entrypoint
from timm.models._hub import _parse_model_cfg
from torch import nn

from linvit.output.files import parse_json, reason
from linvit.output.terminal import printable
from linvit.settings.fields import unknown

CONFIG = "config.json"
# Arguments of timm models in general, whatever the signature of their class.
_COMMON = {
    *("img_size", "num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate"),
    *("bn_eps", "bn_momentum", "bn_tf"),
}
# What timm's factory takes for itself (files, addresses, folders, functions), and where and how a model is placed.
_NEVER = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *("features_only", "feature_cls", "out_indices", "pruned", "self", "args", "kwargs", "device", "dtype"),
}
# Nesting beyond this is not a model's argument.
_MAX_DEPTH = 8


@dataclass(frozen=True)
class ModelDescription:
    """A model as a file describes it. `create_model` checks the architecture and arguments before it uses them.

    Attributes:
        source: the file, for error messages.
        architecture: timm name of the model.
        model_args: arguments of the model.
        pretrained_cfg: preprocessing and classes, as in timm's `pretrained_cfg`; None for those of the architecture.
    """

    source: str
    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] | None = None

    @property
    def img_size(self) -> tuple[int, int] | None:
        """(height, width) of the model's input, if the file records it."""
        size = (self.pretrained_cfg or {}).get("input_size")
        return None if size is None else (size[1], size[2])

    @property
    def class_names(self) -> list[str] | None:
        """Class name of every label, if the file records them."""
        return (self.pretrained_cfg or {}).get("label_names")


class _Config(BaseModel):
    """The entries of config.json that are read first."""

    architecture: str
    model_args: dict[str, Any] = {}
    pretrained_cfg: dict[str, Any] = {}


_CropShare = Annotated[float, Field(gt=0, le=2)]


class _PretrainedCfg(BaseModel):
    """The entries of timm's `pretrained_cfg` that are read from files: those that do not say where weights are."""

    model_config = ConfigDict(allow_inf_nan=False)

    input_size: tuple[int, int, int] | None = None
    test_input_size: tuple[int, int, int] | None = None
    min_input_size: tuple[int, int, int] | None = None
    fixed_input_size: bool = False
    interpolation: str | None = None
    crop_pct: _CropShare | None = None
    test_crop_pct: _CropShare | None = None
    crop_mode: str | None = None
    mean: tuple[float, ...] | None = Field(None, min_length=1)
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(None, min_length=1)
    num_classes: int | None = None
    label_names: list[str] | None = None
    label_descriptions: dict[str, str] | list[str] | None = None
    pool_size: tuple[int, ...] | None = None
    first_conv: str | tuple[str, ...] | None = None
    classifier: str | tuple[str, ...] | None = None
    tag: str | None = None
    license: str | None = None


def read_config(path: Path) -> ModelDescription:
    """Read a config.json of timm. Raises ValueError, naming the file, if it does not describe a model."""
    return parse_config(path, read_json(path))


def parse_config(path: Path, config: dict[str, Any]) -> ModelDescription:
    """The model that the contents of a config.json of timm describe; `path` is the file that holds them.

    Raises ValueError, naming the file, if they do not describe a model.
    """
    first = validated(path, _Config, config)
    try:
        cfg, architecture, model_args = _parse_model_cfg({**config, "model_args": first.model_args}, {})
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} does not describe a model ({reason(error)}); restore that file") from error
    known = {name: value for name, value in cfg.items() if name in _PretrainedCfg.model_fields and value is not None}
    checked = validated(path, _PretrainedCfg, known).model_dump(exclude_none=True)
    return ModelDescription(str(path), architecture, dict(model_args), checked)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file without its null values; raises ValueError, naming the file, for anything else."""
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({reason(error)}); restore that file") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; restore that file")
    return {name: value for name, value in values.items() if value is not None}


def model_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments to save with a model, with which `create_model` builds it again."""
    arguments: dict[str, Any] = get_model_args(model)
    return {name: value for name, value in arguments.items() if name not in _NEVER}


def model_digest(model: nn.Module) -> str:
    """The SHA-256 of a timm model: its architecture, its arguments, and every parameter and buffer.

    The same weights give different outputs with a different pooling or number of heads. Buffers that are not saved
    matter too.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    arguments = [cfg.get("architecture"), model_arguments(model)]
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # Through bytes, because NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_arguments(architecture: str, arguments: dict[str, Any]) -> None:
    """Raise ValueError for the first argument that models of this architecture do not take, or that is not plain data.

    `architecture` must be registered with timm.
    """
    accepted = _accepted(model_entrypoint(architecture.partition(".")[0]).__module__)
    for name, value in arguments.items():
        if name not in accepted:
            raise ValueError(f"{architecture} does not take these arguments: {unknown('keyword', str(name), accepted)}")
        if not _is_plain(value, depth=_MAX_DEPTH):
            raise ValueError(f"{architecture}: the model argument {name} takes finite numbers, text, or lists of these")


@functools.cache
def _accepted(module: str) -> set[str]:
    """Parameters of the classes in a module that defines models, and of the classes that these inherit from."""
    classes = [
        base
        for _, cls in inspect.getmembers(sys.modules[module], inspect.isclass)
        if issubclass(cls, nn.Module) or is_dataclass(cls)
        for base in cls.__mro__
        if "__init__" in vars(base) and base is not object
    ]
    return {
        name for cls in set(classes) for name in inspect.signature(vars(cls)["__init__"]).parameters
    } - _NEVER | _COMMON


def _is_plain(value: Any, *, depth: int) -> bool:
    if isinstance(value, list | tuple | dict):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(each, depth=depth - 1) for each in inner)
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


Checked = TypeVar("Checked", bound=BaseModel)


def validated(path: Path, model: type[Checked], values: dict[str, Any]) -> Checked:
    """`values` of the file at `path` as a `model`. Raises ValueError, naming file and entry, if they are not."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        place = printable(".".join(map(str, problem["loc"])))
        raise ValueError(
            f"{path} does not describe a model ({place}: {problem['msg'].lower()}); restore that file"
        ) from None
