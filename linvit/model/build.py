"""Building timm models by name or from a model specification, with errors that name the problem and a fix.

A specification is a model as written on the command line: `NAME` or `NAME:keyword=value,keyword=value`.
"""

import ast
import inspect
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from timm.models import VisionTransformer, resolve_model_input_args
from torch import Tensor, nn

import linvit.model.registry  # noqa: F401  registers the linvit_* names
from linvit.model.vit import LinformerViT
from linvit.output.files import reason
from linvit.settings.fields import one_of, unknown
from linvit.settings.flags import UsageError

CHECKPOINTING = ("none", "mlp", "full")
ONLY_VITS = "only timm's VisionTransformer, and linvit's, are compared here"


class TimmModel(nn.Module):
    """The type of any model from `timm.create_model`, for the type checker only, since timm has no types."""

    pretrained_cfg: dict[str, Any]
    # timm's checkpoint filters look here for the image size of the pretrained weights.
    pretrained_model_args: dict[str, Any]
    num_classes: int

    def get_classifier(self) -> nn.Module:
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        raise NotImplementedError

    def forward_intermediates(
        self, x: Tensor, indices: int, norm: bool, output_fmt: str, intermediates_only: bool
    ) -> list[Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class ModelSpec:
    """A timm model name, its keywords, and what the backward pass recomputes: one of `CHECKPOINTING`."""

    text: str
    name: str
    kwargs: dict[str, Any]
    grad_checkpointing: str


def check_model_name(name: str) -> None:
    """Raise UsageError, suggesting the nearest name, if timm has no model `name`; local and hub names pass."""
    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        raise UsageError(f"{unknown('model', name, timm.list_models())} (`linvit models` lists them)")


def create_model(
    name: str, *, num_classes: int | None = None, img_size: tuple[int, int] | None = None, **model_kwargs: Any
) -> TimmModel:
    """Create a timm model by name, `local-dir:FOLDER` or `hf-hub:ID`, at `img_size` if its size is fixed.

    Raises ValueError for an unknown name, suggesting the nearest one, for a folder that does not describe a model, for
    arguments that the model does not take, and if pretrained weights are requested but not published.
    """
    check_model_name(name)
    try:
        sized = resolve_model_input_args(name, {"img_size": img_size}, num_classes=num_classes)
        given = {key: sized[key] for key in ("img_size", "num_classes") if key in sized}
        return timm.create_model(name, **{**given, **model_kwargs})
    except (json.JSONDecodeError, KeyError) as error:
        if ":" not in name:
            raise
        raise ValueError(
            f"{name}: its config.json does not describe a model ({reason(error)}); restore that file"
        ) from error
    except TypeError as error:
        raise ValueError(f"{name} does not take these arguments: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{name} cannot be built: {' '.join(str(error).split())}") from error


def parse_spec(text: str) -> ModelSpec:
    """Read a specification. Raises UsageError for an unknown model and for anything that is not keyword=value."""
    name, _, keywords = text.partition(":")
    check_model_name(name)
    kwargs: dict[str, Any] = {}
    # A comma inside a list, as in k=(64,32), is not followed by a keyword.
    for pair in re.split(r",(?=\s*[A-Za-z_]\w*=)", keywords) if keywords else []:
        keyword, equals, value = pair.strip().partition("=")
        if not (equals and value and keyword.isidentifier()):
            raise UsageError(f"{text}: {pair!r} is not keyword=value")
        kwargs[keyword] = _parse_value(value)
    if "img_size" in kwargs:
        raise UsageError(f"{text}: image sizes are given by --img-size, not by the model")
    checkpointing = kwargs.pop("grad_checkpointing", "none")
    if checkpointing not in CHECKPOINTING:
        raise UsageError(f"{text}: grad_checkpointing takes {one_of(CHECKPOINTING)}, not {checkpointing!r}")
    return ModelSpec(text, name, kwargs, checkpointing)


def build(spec: ModelSpec, img_size: tuple[int, int], *, device: Literal["cpu", "meta"] = "cpu") -> VisionTransformer:
    """Build the model for images of (height, width) with weights drawn from seed 0; on the meta device it has none.

    Raises UsageError, naming the specification, for unknown keywords, for values that do not fit, such as k ≥ N, and
    for a model that is not a Vision Transformer.
    """
    torch.manual_seed(0)
    kwargs = {"weight_init": "skip", **spec.kwargs} if device == "meta" else spec.kwargs
    try:
        with torch.device(device):
            model = timm.create_model(spec.name, img_size=img_size, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(f"{spec.text} at {img_size[0]}×{img_size[1]} px: {_explain(error)}") from error
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"{spec.text}: {ONLY_VITS}")
    if spec.grad_checkpointing == "mlp" and not isinstance(model, LinformerViT):
        raise UsageError(f"{spec.text}: only linvit's models can recompute just the mlp; take grad_checkpointing=full")
    if spec.grad_checkpointing != "none":
        model.set_grad_checkpointing("mlp" if spec.grad_checkpointing == "mlp" else True)
    return model


def _parse_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _explain(error: Exception) -> str:
    keyword = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if keyword is None:
        return reason(error)
    if keyword[1] == "img_size":
        return ONLY_VITS
    known = {name for cls in (VisionTransformer, LinformerViT) for name in inspect.signature(cls).parameters}
    return unknown("keyword", keyword[1], known)
