"""Check that a model computes Linformer attention: its first such layer against the equations in linvit.reference."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linvit import reference
from linvit.model.attention import LinformerAttention
from linvit.model.build import ModelSpec, build
from linvit.model.projections import MatrixProjection, Projection
from linvit.settings.flags import UsageError

# With more patches, the reference takes long for a dense E.
MAX_PATCHES = 4096
FLOAT64_BOUND = 1e-10
FLOAT32_BOUND = 1e-3


class Check(NamedTuple):
    """What was compared, at which image size, and the largest difference as a share of the largest value."""

    model: str
    image_size: tuple[int, int]
    compared: str
    largest_difference: float
    bound: float


def size_to_check(spec: ModelSpec, img_size: tuple[int, int]) -> tuple[int, int]:
    """The image size, halved until it has at most 4,096 patches or the model cannot be built any smaller."""
    while build(spec, img_size, device="meta").patch_embed.num_patches > MAX_PATCHES:
        half = (img_size[0] // 2, img_size[1] // 2)
        try:
            build(spec, half, device="meta")
        except UsageError:
            break
        img_size = half
    return img_size


def check_attention(spec: ModelSpec, img_size: tuple[int, int]) -> Check | None:
    """Compare the output and input gradient of a model's first Linformer layer; None if it has no such layer.

    Raises ValueError, naming the model, if the difference is too large.
    """
    model = build(spec, img_size)
    layers = [m for m in model.modules() if isinstance(m, LinformerAttention) and m.projections() is not None]
    if not layers:
        return None
    layer = copy.deepcopy(layers[0]).eval()
    projections = layer.projections()
    assert projections is not None
    num_tokens = layer.num_prefix_tokens + model.patch_embed.num_patches
    x = torch.randn(1, num_tokens, layer.qkv.in_features, generator=torch.Generator().manual_seed(0))
    if all(isinstance(projection, MatrixProjection) for projection in projections):
        compared, bound = "first Linformer layer and linvit.reference, both in float64", FLOAT64_BOUND
        layer.double()
        found, expected = (_with_gradient(f, x.double()) for f in (layer, lambda y: _reference(layer, y)))
    else:
        compared, bound = "first Linformer layer, float32 and, associative, in float64", FLOAT32_BOUND
        precise = copy.deepcopy(layer).double()
        precise.order = "associative"
        found, expected = _with_gradient(layer, x), _with_gradient(precise, x.double())
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected))
    # NaN must fail too, so the test is not `difference > bound`.
    if not difference <= bound:
        raise ValueError(
            f"{spec.text} is not timed: its attention differs from the reference by {difference:.1e} "
            f"(rounding explains at most {bound:.0e}), so it computes something else"
        )
    return Check(spec.text, img_size, compared, difference, bound)


def _with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """`function(x)`, and the gradient of its product with a fixed random tensor with respect to x."""
    x = x.clone().requires_grad_()
    y = function(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(y, x, direction.to(y.dtype))
    return y.detach(), gradient


def _reference(layer: LinformerAttention, x: Tensor) -> Tensor:
    projections = layer.projections()
    assert projections is not None
    assert isinstance(layer.proj, nn.Linear)
    E, F = (_head_matrices(projection, layer.num_heads) for projection in projections)
    return reference.linformer_attention(
        x,
        qkv_weight=layer.qkv.weight,
        qkv_bias=layer.qkv.bias,
        out_weight=layer.proj.weight,
        out_bias=layer.proj.bias,
        E=E,
        F=F,
        num_prefix_tokens=layer.num_prefix_tokens,
    )


def _head_matrices(projection: Projection, num_heads: int) -> list[Tensor]:
    """E of every head, each (k of the head, N)."""
    assert isinstance(projection, MatrixProjection)
    matrices = projection.matrix().expand(num_heads, -1, -1)
    lengths = projection.lengths * (num_heads // len(projection.lengths))
    return [matrix[:length] for matrix, length in zip(matrices, lengths)]
