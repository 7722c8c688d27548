"""Models as one writes them on the command line: `NAME` or `NAME:keyword=value,keyword=value`."""

import ast
import inspect
import re
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from timm.models import VisionTransformer

import linvit.models  # noqa: F401  registers the names
from linvit.commandline import UsageError
from linvit.files import reason
from linvit.validation import one_of, unknown
from linvit.vit import LinformerViT

CHECKPOINTING = ("none", "mlp", "full")
NO_VIT = "only timm's VisionTransformer, and linvit's, are compared here"


@dataclass(frozen=True)
class ModelSpec:
    """A timm model name, its keywords, and what is recomputed in the backward pass: none, mlp or full."""

    text: str
    name: str
    kwargs: dict[str, Any]
    grad_checkpointing: str


def parse_spec(text: str) -> ModelSpec:
    """Read a spec; raises UsageError for an unknown model and for what is no keyword=value."""
    name, _, keywords = text.partition(":")
    if not timm.is_model(name):
        raise UsageError(unknown("model", name, timm.list_models()))
    kwargs: dict[str, Any] = {}
    # A comma inside a list, as in k=(64,32), is followed by no keyword.
    for pair in re.split(r",(?=\s*[A-Za-z_]\w*=)", keywords) if keywords else []:
        keyword, equals, value = pair.strip().partition("=")
        if not (equals and value and keyword.isidentifier()):
            raise UsageError(f"{text}: {pair!r} is not keyword=value")
        kwargs[keyword] = _value(value)
    if "img_size" in kwargs:
        raise UsageError(f"{text}: image sizes are given by --img-size, not by the model")
    checkpointing = kwargs.pop("grad_checkpointing", "none")
    if checkpointing not in CHECKPOINTING:
        raise UsageError(f"{text}: grad_checkpointing takes {one_of(CHECKPOINTING)}, not {checkpointing!r}")
    return ModelSpec(text, name, kwargs, checkpointing)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def build(spec: ModelSpec, img_size: tuple[int, int], *, device: Literal["cpu", "meta"] = "cpu") -> VisionTransformer:
    """The model for images of (height, width), its weights drawn from seed 0; on the meta device it has none.

    Raises UsageError, naming the spec, for what does not go together: unknown keywords, k ≥ N, no Vision Transformer.
    """
    torch.manual_seed(0)
    kwargs = {"weight_init": "skip", **spec.kwargs} if device == "meta" else spec.kwargs
    try:
        with torch.device(device):
            model = timm.create_model(spec.name, img_size=img_size, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(f"{spec.text} at {img_size[0]}×{img_size[1]} px: {_explain(error)}") from error
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"{spec.text}: {NO_VIT}")
    if spec.grad_checkpointing == "mlp" and not isinstance(model, LinformerViT):
        raise UsageError(f"{spec.text}: only linvit's models recompute the mlp alone; take grad_checkpointing=full")
    if spec.grad_checkpointing != "none":
        model.set_grad_checkpointing("mlp" if spec.grad_checkpointing == "mlp" else True)
    return model


def _explain(error: Exception) -> str:
    keyword = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if keyword is None:
        return reason(error)
    if keyword[1] == "img_size":
        return NO_VIT
    known = {name for cls in (VisionTransformer, LinformerViT) for name in inspect.signature(cls).parameters}
    return unknown("keyword", keyword[1], known)
