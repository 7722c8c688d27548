"""A short descent on all weights of one attention layer: E, F, Wq, Wk, Wv, Wo, against the tokens behind it.

A step takes a few images and a few of their patches as queries, whose keys and values come from all patches: a small
part of what a training step of the layer would cost. Every tensor moves by a share of its own size, so that one rate
does for all of them. What is best on the images held out is kept, also where that is the beginning.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from linvit.conversion.streams import Streams, attended
from linvit.model.attention import LinformerAttention

# Of a tensor's root mean square, in the first steps of Adam.
RATE = 0.01
WARMUP_STEPS = 20
NUM_CHECKS = 8


@dataclass(frozen=True)
class Descent:
    """How long, and on how much a step."""

    steps: int = 160
    images: int = 8
    queries: int = 128


def descend(
    block: Block,
    parameters: Iterable[nn.Parameter],
    streams: Streams,
    wanted: Tensor,
    descent: Descent,
    generator: torch.Generator,
) -> None:
    """Fit parameters of the block's attention so that the tokens before its MLP become `wanted` (n, T, D)."""
    attention: LinformerAttention = block.attn
    optimizer = torch.optim.Adam([{"params": [each], "size": _size(each)} for each in parameters], betas=(0.9, 0.98))
    weights, fitted = streams.weights(wanted), streams.num_fitted
    best = _Best(attention, lambda: held_out_error(block, streams, wanted, weights))
    num_patches = wanted.shape[1] - streams.num_prefix_tokens
    for step in range(descent.steps):
        rate = RATE * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / descent.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["size"]
        images = torch.randperm(fitted, generator=generator)[: descent.images]
        patches = torch.randperm(num_patches, generator=generator)[: descent.queries]
        tokens = torch.cat([torch.arange(streams.num_prefix_tokens), streams.num_prefix_tokens + patches])
        counts = weights[images][:, tokens]
        # The patches drawn stand for all.
        counts[:, streams.num_prefix_tokens :] *= num_patches / len(patches)
        x = streams.converted[images]
        normed = block.norm1(x)
        added = block.ls1(attention.attend_to(normed)(normed[:, tokens], slice(None)))
        squares = (x[:, tokens] + added - wanted[images][:, tokens]).square().sum(-1)
        optimizer.zero_grad()
        (squares * counts).mean().backward()
        optimizer.step()
        if (step + 1) % max(descent.steps // NUM_CHECKS, 1) == 0:
            best.check()
    best.restore()


def held_out_error(block: Block, streams: Streams, wanted: Tensor, weights: Tensor) -> float:
    """Weighted mean square of what the tokens before the MLP are off, on the images that were held out."""
    found = streams.map(partial(attended, block), streams.held_out(streams.converted))
    squares = (found - streams.held_out(wanted)).square().sum(-1)
    return float((squares * streams.held_out(weights)).mean())


class _Best:
    """The weights of a layer at which an error was lowest so far."""

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
    # A tensor of zeros, such as an untrained bias, has no size to go by.
    return float(parameter.detach().square().mean().sqrt()) or 0.1
