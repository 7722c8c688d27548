"""Fit one layer so that its tokens match the original's: ridge regression, and gradient descent.

Ridge regression (`best_change`) refits the last linear layer of an attention or an MLP in closed form. That layer adds
γ (W h + b) to the tokens, with input h and LayerScale γ. The change of γW is the ridge regression of r on h, where r is
what the tokens still lack. The penalty is on the size of the change, so weak evidence leaves the original weights as
they are. The held-out images choose the penalty, or reject the change.

Gradient descent (`descend`) trains E, F, Wq, Wk, Wv and Wo of one attention layer. A step takes a few images and a few
of their patches as queries; keys and values still come from all patches. That costs a small part of a full training
step of the layer. Every tensor moves by a fraction of its own size, so one rate suits all of them.

D' input width, D output width, n images, T tokens.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from linvit.conversion.blocks import after_attention, scale_attention
from linvit.conversion.calibration import Activations
from linvit.model.projected import ProjectedAttention

# Relative to the mean square of the layer's input. The heads' outputs span few dimensions per image, so a penalty that
# is too small fits these images only.
PENALTIES = (1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
# Below this LayerScale the weights before it have no effect.
MIN_LAYER_SCALE = 1e-12
# Peak step of Adam, relative to a tensor's root mean square.
RELATIVE_RATE = 0.01
WARMUP_STEPS = 20
# How often the held-out error is measured during a descent.
NUM_CHECKS = 8


@dataclass
class Moments:
    """The weighted sums over tokens that a regression needs, in double precision."""

    inputs: Tensor  # (D' + 1, D' + 1); the last row and column belong to the bias
    products: Tensor  # (D' + 1, D)

    @classmethod
    def empty(cls, width: int, out: int, device: torch.device) -> "Moments":
        """Sums over no tokens, for input width `width` and output width `out`."""
        inputs = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        return cls(inputs, inputs.new_zeros(width + 1, out))

    def add(self, h: Tensor, residual: Tensor, weights: Tensor) -> None:
        """Add tokens: inputs h (…, D'), residual (…, D), weights (…)."""
        rows = with_ones(h.flatten(0, -2).to(residual.dtype))
        weighted = rows * weights.flatten()[:, None]
        with torch.autocast(h.device.type, enabled=False):
            self.inputs += (weighted.mT @ rows).double()
            self.products += (weighted.mT @ residual.flatten(0, -2)).double()

    def gain(self, change: Tensor) -> float:
        """Decrease of the weighted sum of squared residuals by a change (D' + 1, D) of γ[W b]."""
        return float((change * (2 * self.products - self.inputs @ change)).sum())


def with_ones(h: Tensor) -> Tensor:
    """Append a column of ones to h (…, D'): (…, D' + 1)."""
    return torch.cat([h, h.new_ones(*h.shape[:-1], 1)], dim=-1)


def best_change(fitted: Moments, held_out: Moments, *, has_bias: bool) -> Tensor:
    """The ridge solution for the fitted images that gains most on the held-out ones; zeros if none gains."""
    no_change = torch.zeros_like(fitted.products)
    return max([no_change, *ridge_solutions(fitted, has_bias=has_bias)], key=held_out.gain)


def ridge_solutions(moments: Moments, *, has_bias: bool) -> Iterator[Tensor]:
    """Changes (D' + 1, D) of γ[W b] for each penalty, from the largest; the bias is not penalised."""
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
        if failed:  # singular: smaller penalties would fail too
            return
        weight = torch.cholesky_solve(right, factor)
        bias = mean_product - centre @ weight if has_bias else torch.zeros_like(mean_product)
        yield torch.cat([weight, bias[None]])


@torch.no_grad()
def add_change(layer: nn.Linear, scale: Tensor | None, change: Tensor) -> None:
    """Add a change (D' + 1, D) of γ[W b] to `layer`; `scale` is the γ (D) after it, if any."""
    if scale is not None:
        gamma = scale.double()
        change = torch.where(gamma.abs() > MIN_LAYER_SCALE, change / gamma, 0.0)
    change = change.to(layer.weight.dtype)
    layer.weight.add_(change[:-1].mT)
    if layer.bias is not None:
        layer.bias.add_(change[-1])


@contextlib.contextmanager
def replaced_by_identity(module: nn.Module, name: str) -> Iterator[nn.Linear]:
    """Take the last linear layer out of `module`, which then returns that layer's input."""
    layer = getattr(module, name)
    setattr(module, name, nn.Identity())
    try:
        yield layer
    finally:
        setattr(module, name, layer)


@dataclass(frozen=True)
class DescentOptions:
    """Number of steps, and the images and patches (queries) per step."""

    steps: int = 160
    images: int = 8
    queries: int = 128


def descend(
    block: Block,
    arguments: dict[str, Any],
    parameters: Iterable[nn.Parameter],
    activations: Activations,
    target: Tensor,
    options: DescentOptions,
    generator: torch.Generator,
) -> None:
    """Train parameters of the block's attention until the tokens after it match `target` (n, T, D).

    The weights with the lowest error on the held-out images are kept, which may be the initial ones.
    """
    attention: ProjectedAttention = block.attn
    optimizer = torch.optim.Adam([{"params": [each], "size": _size(each)} for each in parameters], betas=(0.9, 0.98))
    weights, num_prefix = activations.weights(target), activations.num_prefix_tokens
    best = _BestState(attention, lambda: _held_out_error(block, arguments, activations, target, weights))
    num_patches = target.shape[1] - num_prefix
    for step in range(options.steps):
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        rate = RELATIVE_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["size"]
        images = torch.randperm(activations.num_fitted, generator=generator)[: options.images]
        patches = torch.randperm(num_patches, generator=generator)[: options.queries]
        tokens = torch.cat([torch.arange(num_prefix), num_prefix + patches])
        token_weight = weights[images][:, tokens]
        # The sampled patches represent all patches.
        token_weight[:, num_prefix:] *= num_patches / len(patches)
        x = activations.converted[images]
        normed = block.norm1(x)
        added = scale_attention(block, attention.outputs_of(normed, tokens, **arguments))
        squares = (x[:, tokens] + added - target[images][:, tokens]).square().sum(-1)
        optimizer.zero_grad()
        (squares * token_weight).mean().backward()
        optimizer.step()
        if (step + 1) % max(options.steps // NUM_CHECKS, 1) == 0:
            best.check()
    best.restore()


def _held_out_error(
    block: Block, arguments: dict[str, Any], activations: Activations, target: Tensor, weights: Tensor
) -> float:
    """Weighted mean squared error of the tokens after the attention, on the held-out images."""
    tokens = activations.map(partial(after_attention, block, arguments), activations.held_out(activations.converted))
    squares = (tokens - activations.held_out(target)).square().sum(-1)
    return float((squares * activations.held_out(weights)).mean())


class _BestState:
    """A copy of a layer's weights at its lowest error so far."""

    def __init__(self, layer: nn.Module, error: Callable[[], float]) -> None:
        self.layer, self.error = layer, error
        self.lowest = math.inf
        self.check()

    def check(self) -> None:
        error = self.error()
        if error < self.lowest:
            self.lowest = error
            self.state = {name: value.clone() for name, value in self.layer.state_dict().items()}

    def restore(self) -> None:
        self.layer.load_state_dict(self.state)


def _size(parameter: Tensor) -> float:
    # A tensor of zeros, such as an untrained bias, has no size of its own.
    return float(parameter.detach().square().mean().sqrt()) or 0.1
