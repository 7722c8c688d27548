"""A projected length for each layer, by what it costs and what pooling does to the model's last tokens.

The spectrum of attention (`linvit.plan_k`) bounds what the best matrix of a rank could keep for one image; E is one and
the same for all images. So here each length is tried, on a few images.

An error behind one layer is not the same as behind another: what early layers lose, later ones partly make up for. So
for each layer one length in the middle is followed to the end of the model, and tells what its errors count.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from linvit.conversion.convert import attentions, convert_unchecked
from linvit.conversion.streams import Streams, attended, fed_forward, relative_error
from linvit.measure.flops import count_flops
from linvit.model.projections import GridSize, Projection
from linvit.model.vit import LinformerViT, Share
from linvit.spectrum import plan as knapsack
from linvit.spectrum.plan import lengths_to_try

# Lengths nearer to each other cost and lose about the same.
STEP = 1.5
MIN_K = 16
# Into which a layer's operations are divided to count them.
UNITS = 1000

Pair = tuple[Projection | None, Projection | None]


@dataclass(frozen=True)
class Offer:
    """One length in one layer (None: ordinary attention): operations, squared error of the model's last tokens."""

    k: int | None
    flops: float
    error: float


def plan_lengths(
    model: VisionTransformer,
    tokens: Tensor,
    *,
    speedup: float,
    projection: str,
    share: Share,
    at: tuple[int, int] | None = None,
    amp: bool = False,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> list[int | None]:
    """Lengths with which the model takes `speedup` times fewer operations, at the least sum of squared errors.

    Args:
        model: in evaluation mode.
        tokens: what enters its first block (B, T, D), on a few images.
        speedup: of the whole model, in operations; time falls by more where sequences are long.
        projection: kind of E and F, not fitted yet.
        share: who shares E and F; "layerwise" takes one length for all layers that it shortens.
        at: (height, width) of the images whose operations count, no smaller than the model's own; its own if none.
        amp: whether blocks compute in bfloat16.

    Raises ValueError where no lengths are that fast.
    """
    if not speedup > 1:
        raise ValueError(f"--speedup {speedup:g} leaves nothing to plan: give more than 1")
    lengths = _lengths(model.patch_embed.grid_size)
    streams = Streams(tokens, tokens, len(tokens), model.num_prefix_tokens, batch_size=4, amp=amp)
    offers = []
    for layer in _offers(model, streams, lengths, projection=projection, share=share, at=at):
        offers.append(layer)
        report(len(offers), len(model.blocks))
    ordinary = _flops(model, at)
    if share == "layerwise":
        plans = [_choose([[each[i], each[-1]] for each in offers], ordinary / speedup) for i in range(len(lengths))]
    else:
        plans = [_choose(offers, ordinary / speedup)]
    found = [plan for plan in plans if plan is not None]
    if not found:
        fastest = ordinary / sum(min(offer.flops for offer in each) for each in offers)
        raise ValueError(f"--speedup {speedup:g} cannot be reached: k={lengths[0]} in every layer gives {fastest:.2f}")
    best = min(found, key=lambda plan: sum(offer.error for offer in plan))
    return [offer.k for offer in best]


def _lengths(grid_size: GridSize) -> list[int]:
    lengths: list[int] = []
    for k in lengths_to_try(grid_size, min_k=MIN_K):
        if not lengths or k >= STEP * lengths[-1]:
            lengths.append(k)
    if not lengths:
        raise ValueError(f"--k plan: {grid_size[0]}×{grid_size[1]} patches are too few; choose a larger --img-size")
    return lengths


def _offers(
    model: VisionTransformer,
    streams: Streams,
    lengths: list[int],
    *,
    projection: str,
    share: Share,
    at: tuple[int, int] | None = None,
) -> Iterator[list[Offer]]:
    """For each layer what each length costs and loses, from the shortest, and ordinary attention last."""
    depth = len(model.blocks)
    ordinary = Offer(None, _flops(model, at) / depth, 0.0)
    flops: dict[int, float] = {}
    projections: dict[int, list[Pair]] = {}
    for k in lengths:
        converted = convert_unchecked(model, k=k, projection=projection, share=share)
        flops[k] = _flops(converted, at) / depth
        projections[k] = [(each.key_projection, each.value_projection) for each in attentions(converted)]
    for errors in _errors(model, converted, projections, streams):
        yield [*(Offer(k, flops[k], error) for k, error in errors.items()), ordinary]


def _choose(offers: list[list[Offer]], budget: float) -> list[Offer] | None:
    """The offers of least error together that cost no more than the budget; None: all are too slow."""
    costs = [[knapsack.Offer(offer.flops, -offer.error) for offer in layer] for layer in offers]
    numbers = knapsack.choose(costs, budget, unit=offers[0][-1].flops / UNITS)
    return None if numbers is None else [layer[number] for layer, number in zip(offers, numbers)]


def _errors(
    model: VisionTransformer, converted: LinformerViT, projections: dict[int, list[Pair]], streams: Streams
) -> Iterator[dict[int, float]]:
    """For each layer, by length, about the mean square error of the last tokens, all other layers being exact."""
    middle = list(projections)[len(projections) // 2]
    last = streams.map(partial(_finish, model, 0), streams.original)
    for layer, (block, own) in enumerate(zip(model.blocks, converted.blocks)):
        wanted = streams.map(partial(attended, block), streams.original)
        weights = streams.weights(wanted)
        errors = {}
        for k, pairs in projections.items():
            own.attn.set_projections(*pairs[layer])
            found = streams.map(partial(attended, own), streams.original)
            errors[k] = relative_error(found, wanted, weights) ** 2
            if k == middle:
                found = streams.map(partial(fed_forward, block), found)
                lost = _lost(streams.map(partial(_finish, model, layer + 1), found), last, model.num_prefix_tokens)
        # Where pooling does not even change the layer's own tokens, no length loses anything.
        share = lost / errors[middle] if errors[middle] > 0 else 0.0
        yield {k: share * error for k, error in errors.items()}
        streams.original = streams.map(partial(fed_forward, block), wanted)


def _finish(model: VisionTransformer, first: int, tokens: Tensor) -> Tensor:
    """The model's last tokens (B, T, D), from what enters its block number `first`."""
    last: Tensor = model.norm(model.blocks[first:](tokens))
    return last


def _lost(found: Tensor, wanted: Tensor, num_prefix_tokens: int) -> float:
    """Mean squares of the relative errors of prefix tokens and of patches, added up: either may be read."""
    relative = (found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)
    parts = (relative[:, :num_prefix_tokens], relative[:, num_prefix_tokens:])
    return sum(float(part.mean()) for part in parts if part.numel())


def _flops(model: nn.Module, at: tuple[int, int] | None) -> int:
    """Operations of a forward pass on one image, of the model's own size or another."""
    bare = copy.deepcopy(model)
    assert isinstance(bare, VisionTransformer)
    if at is not None:
        bare.set_input_size(img_size=at)
    bare.to("meta")
    if isinstance(bare, LinformerViT):
        for attention in attentions(bare):
            attention.fused_attn = True
    images = torch.empty(1, bare.in_chans, *bare.patch_embed.img_size, device="meta")
    return count_flops(bare, images, mode="forward")
