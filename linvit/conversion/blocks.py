"""The parts of a transformer block that a fit needs, the same for timm's `Block` and for the rotary `EvaBlock`.

B images, T tokens, D width.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from timm.models import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.model.eva import rotary_of_layers
from linvit.model.tokens import find_patches

# The models that can be converted. Their blocks compute x + γ attn(norm1(x)), then x + γ mlp(norm2(x)).
Vit: TypeAlias = VisionTransformer | Eva


def embed(model: Vit, images: Tensor) -> Tensor:
    """The tokens (B, T, D) that enter the first block, for images (B, 3, H, W)."""
    placed = model._pos_embed(model.patch_embed(images))
    # Rotary models also return the embedding of queries and keys.
    tokens: Tensor = model.norm_pre(placed[0] if isinstance(placed, tuple) else placed)
    return tokens


def block_arguments(model: Vit) -> list[dict[str, Any]]:
    """The keywords that the attention of each block takes beside the tokens, at the model's own image size."""
    return [{} if rope is None else {"rope": rope} for rope in rotary_of_layers(model)]


def last_tokens(model: Vit, first: int, tokens: Tensor) -> Tensor:
    """The tokens after the last norm (B, T, D), from those that enter the block number `first`."""
    for block, arguments in list(zip(model.blocks, block_arguments(model)))[first:]:
        tokens = block(tokens, **arguments)
    out: Tensor = model.norm(tokens)
    return out


def attended(block: Block, tokens: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What the attention of a block gives (B, T, D), before γ, for the tokens that enter the block."""
    out: Tensor = block.attn(block.norm1(tokens), **arguments)
    return out


def after_attention(block: Block, arguments: dict[str, Any], tokens: Tensor) -> Tensor:
    """The tokens after a block's attention, from those that enter the block; in evaluation mode."""
    return tokens + scale_attention(block, attended(block, tokens, arguments))


def after_mlp(block: Block, tokens: Tensor) -> Tensor:
    """The tokens after a block's MLP, from those after its attention; in evaluation mode."""
    return tokens + scale_mlp(block, block.mlp(block.norm2(tokens)))


@contextlib.contextmanager
def without_local(attention: Any) -> Iterator[None]:
    """Leave out the convolution beside attention, if there is one."""
    local = getattr(attention, "local", None)
    if local is None:
        yield
        return
    attention.local = None
    try:
        yield
    finally:
        attention.local = local


def local_added(block: Block, tokens: Tensor, y: Tensor) -> Tensor:
    """y (B, T, D) and the output of the convolution beside attention, for the tokens that enter the block."""
    local = getattr(block.attn, "local", None)
    if local is None:
        return y
    normed, num_prefix = block.norm1(tokens), block.attn.num_prefix_tokens
    patches = find_patches(normed, local.grid_size, num_prefix, layout=None, mask=None)
    return y + F.pad(local(normed, patches), (0, 0, num_prefix, 0))


def scale_attention(block: Block, y: Tensor) -> Tensor:
    """γ y for the γ after a block's attention, if it has LayerScale."""
    return _scaled(y, attention_scale(block))


def scale_mlp(block: Block, y: Tensor) -> Tensor:
    """γ y for the γ after a block's MLP, if it has LayerScale."""
    return _scaled(y, mlp_scale(block))


def attention_scale(block: Block) -> Tensor | None:
    """The γ (D) after a block's attention; None without LayerScale."""
    return block.gamma_1 if hasattr(block, "gamma_1") else _gamma(block.ls1)


def mlp_scale(block: Block) -> Tensor | None:
    """The γ (D) after a block's MLP; None without LayerScale."""
    return block.gamma_2 if hasattr(block, "gamma_2") else _gamma(block.ls2)


def _gamma(layer: nn.Module) -> Tensor | None:
    gamma = getattr(layer, "gamma", None)
    assert gamma is None or isinstance(gamma, Tensor)
    return gamma


def _scaled(y: Tensor, gamma: Tensor | None) -> Tensor:
    return y if gamma is None else torch.mul(y, gamma)
