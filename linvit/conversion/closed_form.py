"""The last linear layer of an attention or an MLP, refitted in closed form.

A block adds to its tokens γ (W h + b), h what enters the layer. With r what is then still missing to the original's
tokens, the change of γW is the ridge regression of r on h: penalised by its size, so that without evidence the
original's weights stay. The images held out decide how strong the penalty is, and whether there is any change.

R tokens, D' width of h, D width of r.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

# Of the mean square of what enters the layer; the heads' outputs of one image span few dimensions, so that too little
# fits the images and nothing else.
PENALTIES = (1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
# Where LayerScale is nothing, no weight before it matters.
LEAST_SCALE = 1e-12


@dataclass
class Moments:
    """Weighted sums over tokens, from which the regression follows; in double precision."""

    inputs: Tensor  # (D' + 1, D' + 1), the last row and column of ones
    products: Tensor  # (D' + 1, D)

    @classmethod
    def empty(cls, width: int, out: int, device: torch.device) -> "Moments":
        inputs = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        return cls(inputs, inputs.new_zeros(width + 1, out))

    def add(self, h: Tensor, missing: Tensor, weights: Tensor) -> None:
        """Take in tokens: h (…, D'), missing (…, D), weights (…)."""
        rows = with_ones(h.flatten(0, -2).to(missing.dtype))
        weighted = rows * weights.flatten()[:, None]
        with torch.autocast(h.device.type, enabled=False):
            self.inputs += (weighted.mT @ rows).double()
            self.products += (weighted.mT @ missing.flatten(0, -2)).double()

    def gain(self, found: Tensor) -> float:
        """By how much less is missing after a change (D' + 1, D) of γ[W b]: weighted sum of squares."""
        return float((found * (2 * self.products - self.inputs @ found)).sum())


def with_ones(h: Tensor) -> Tensor:
    """h (…, D') with a column of ones: (…, D' + 1)."""
    return torch.cat([h, h.new_ones(*h.shape[:-1], 1)], dim=-1)


def best_change(fitted: Moments, held_out: Moments, *, has_bias: bool) -> Tensor:
    """Of the solutions for some images the one that gains most on others; zeros where none gains."""
    none = torch.zeros_like(fitted.products)
    return max([none, *solutions(fitted, has_bias=has_bias)], key=held_out.gain)


def solutions(moments: Moments, *, has_bias: bool) -> Iterator[Tensor]:
    """Changes of γ[W b] as (D' + 1, D), by falling penalty; the bias goes free."""
    inputs, products = moments.inputs, moments.products
    width = inputs.shape[0] - 1
    centre, mean_product = inputs[:width, width] / inputs[width, width], products[width] / inputs[width, width]
    gram, right = inputs[:width, :width], products[:width]
    if has_bias:
        gram = gram - inputs[width, width] * centre[:, None] * centre[None]
        right = right - inputs[width, width] * centre[:, None] * mean_product[None]
    scale = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    for penalty in PENALTIES:
        factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(penalty * scale.expand(width)))
        if failed:  # too little evidence for so small a penalty
            return
        weight = torch.cholesky_solve(right, factor)
        bias = mean_product - centre @ weight if has_bias else torch.zeros_like(mean_product)
        yield torch.cat([weight, bias[None]])


@torch.no_grad()
def change(layer: nn.Linear, scale: nn.Module, found: Tensor) -> None:
    """Add a change of γ[W b], (D' + 1, D), to the layer that γ, LayerScale or nothing, follows."""
    if isinstance(scale, LayerScale):
        gamma = scale.gamma.double()
        found = torch.where(gamma.abs() > LEAST_SCALE, found / gamma, 0.0)
    found = found.to(layer.weight.dtype)
    layer.weight.add_(found[:-1].mT)
    if layer.bias is not None:
        layer.bias.add_(found[-1])


@contextlib.contextmanager
def without(module: nn.Module, name: str) -> Iterator[nn.Linear]:
    """The module with its last linear layer taken out, so that it returns what would enter that layer."""
    layer = getattr(module, name)
    setattr(module, name, nn.Identity())
    try:
        yield layer
    finally:
        setattr(module, name, layer)
