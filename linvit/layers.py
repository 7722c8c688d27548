"""Layers by name, so that what a model is made of can be written down: in args.yaml, in config.json."""

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers import LayerNorm, SwiGLU, SwiGLUPacked, get_norm_layer
from torch import nn

from linvit.mlp import LeanMlp
from linvit.validation import none_of

# `mlp` is timm's Mlp, keeping less for the backward pass; the others are timm's own.
MLP_LAYERS: dict[str, Callable[..., nn.Module]] = {"mlp": LeanMlp, "swiglu": SwiGLU, "swiglu_packed": SwiGLUPacked}

LayerLike = str | Callable[..., nn.Module] | None


def mlp_class(layer: LayerLike) -> Callable[..., nn.Module]:
    """The MLP of that name; a class is itself, None the default. Raises ValueError for an unknown name."""
    if not isinstance(layer, str):
        return layer or LeanMlp
    if layer not in MLP_LAYERS:
        raise ValueError(none_of("mlp_layer", layer, MLP_LAYERS))
    return MLP_LAYERS[layer]


def norm_with_eps(layer: LayerLike, eps: float) -> Any:
    """timm's normalisation of that name (None: layer norm), or a class, with its `eps`."""
    return partial(get_norm_layer(layer) or LayerNorm, eps=eps)
