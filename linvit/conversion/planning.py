"""Choose a projected length for each layer, by its cost and its effect on the model's last tokens.

The spectrum of attention (`linvit.plan_k`) bounds what the best matrix of a given rank could keep for one image, but E
is the same matrix for all images. So each length is tried on a few images.

The budget is in seconds of this device or in operations. A length that is no faster than ordinary attention is never
offered, so a plan by time is not slower than the original.

Equal errors after two layers do not harm the model equally, because later layers partly correct the errors of early
ones. So for each layer one medium length runs to the end of the model, and its error there scales the layer's errors.

n images, T tokens, D width.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from linvit.conversion.blocks import Vit, after_attention, after_mlp, block_arguments, last_tokens
from linvit.conversion.calibration import Activations, last_tokens_error, relative_error
from linvit.conversion.convert import attentions, convert_unchecked
from linvit.conversion.layer_times import measure_layer_times
from linvit.measure.timing import count_flops
from linvit.model.projections import GridSize, Projection
from linvit.model.sharing import Share
from linvit.model.transformer import LinformerTransformer
from linvit.spectrum.plan import Item, choose, lengths_to_try

# Smallest ratio of neighbouring lengths; closer ones have about the same cost and error.
MIN_RATIO = 1.5
MIN_K = 16
# Resolution of the budget: parts of the cost of one layer with ordinary attention.
UNITS = 1000

PlanBy = Literal["time", "flops"]
Pair = tuple[Projection | None, Projection | None]


@dataclass(frozen=True)
class Offer:
    """A length for a layer (None: ordinary attention), its cost and squared error of the last tokens."""

    k: int | None
    # Seconds or operations per image, with the layer's part of the rest of the model.
    cost: float
    error: float


def plan_lengths(
    model: Vit,
    tokens: Tensor,
    *,
    speedup: float,
    projection: str,
    share: Share,
    local: int | None = None,
    target_size: tuple[int, int] | None = None,
    by: PlanBy = "time",
    amp: bool = False,
    times_in_bfloat16: bool = False,
    batch_size: int = 1,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> list[int | None]:
    """The lengths with the smallest sum of squared errors that make the model `speedup` times cheaper.

    Args:
        model: in evaluation mode.
        tokens: tokens (n, T, D) that enter its first block, for a few images.
        speedup: ratio of seconds or operations, for the whole model.
        projection: kind of E and F, tried before any fit.
        share: which heads and layers share E and F; "layerwise" chooses one length for all converted layers.
        local: side of the kernel of a convolution beside attention, or None.
        target_size: (height, width) at which costs are measured, no smaller than the model's size (the default).
        by: "time" measures seconds on the model's device, "flops" counts operations.
        amp: whether blocks compute in bfloat16 when errors are measured.
        times_in_bfloat16, batch_size: precision and images per pass when time is measured.
        report: called after each layer with the number of layers done and their total.

    Raises ValueError if no lengths are that cheap, if none is faster than ordinary attention, or if the grid has too
    few patches.
    """
    if not speedup > 1:
        raise ValueError(f"--speedup {speedup:g} must be more than 1")
    lengths = _lengths(model.patch_embed.grid_size)
    activations = Activations(tokens, tokens, len(tokens), model.num_prefix_tokens, 4, amp=amp)
    costs = _costs(
        model, lengths, projection, share, local, target_size, by=by, amp=times_in_bfloat16, batch_size=batch_size
    )
    lengths = [k for k in lengths if costs[k] < costs[None]]
    if not lengths:
        height, width = target_size or model.patch_embed.img_size
        raise ValueError(
            f"--k plan: at {height}x{width} no length is faster than ordinary attention on this device: keep the "
            f"original model, or plan for a larger --target-size"
        )
    offers = []
    for layer in _offers(model, activations, costs, lengths, projection=projection, share=share, local=local):
        offers.append(layer)
        report(len(offers), len(model.blocks))
    ordinary = costs[None] * len(model.blocks)
    if share == "layerwise":
        plans = [_choose([[each[i], each[-1]] for each in offers], ordinary / speedup) for i in range(len(lengths))]
    else:
        plans = [_choose(offers, ordinary / speedup)]
    affordable = [plan for plan in plans if plan is not None]
    if not affordable:
        fastest = min(lengths, key=costs.__getitem__)
        found = costs[None] / costs[fastest]
        raise ValueError(f"--speedup {speedup:g} cannot be reached: k={fastest} in every layer gives {found:.2f}")
    best = min(affordable, key=lambda plan: sum(offer.error for offer in plan))
    return [offer.k for offer in best]


def _lengths(grid_size: GridSize) -> list[int]:
    lengths: list[int] = []
    for k in lengths_to_try(grid_size, min_k=MIN_K):
        if not lengths or k >= MIN_RATIO * lengths[-1]:
            lengths.append(k)
    if not lengths:
        raise ValueError(f"--k plan: {grid_size[0]}×{grid_size[1]} patches are too few; choose a larger --img-size")
    return lengths


def _costs(
    model: Vit,
    lengths: list[int],
    projection: str,
    share: Share,
    local: int | None,
    img_size: tuple[int, int] | None,
    *,
    by: PlanBy,
    amp: bool,
    batch_size: int,
) -> dict[int | None, float]:
    """The cost of one layer by length, with an equal part of the rest of the model; None is ordinary attention."""
    depth = len(model.blocks)
    if by == "time":
        times = measure_layer_times(
            model,
            lengths,
            projection=projection,
            share=share,
            local=local,
            img_size=img_size,
            amp=amp,
            batch_size=batch_size,
        )
        return {k: times.per_layer(k, depth=depth) for k in (None, *lengths)}
    found: dict[int | None, float] = {None: _flops(model, img_size) / depth}
    for k in lengths:
        converted = convert_unchecked(model, k=k, projection=projection, share=share, local=local)
        found[k] = _flops(converted, img_size) / depth
    return found


def _offers(
    model: Vit,
    activations: Activations,
    costs: dict[int | None, float],
    lengths: list[int],
    *,
    projection: str,
    share: Share,
    local: int | None = None,
) -> Iterator[list[Offer]]:
    """For each layer, the offers by rising length; ordinary attention comes last."""
    projections: dict[int, list[Pair]] = {}
    for k in lengths:
        converted = convert_unchecked(model, k=k, projection=projection, share=share, local=local)
        projections[k] = [(each.key_projection, each.value_projection) for each in attentions(converted)]
    ordinary = Offer(None, costs[None], 0.0)
    for errors in _errors(model, converted, projections, activations):
        yield [*(Offer(k, costs[k], error) for k, error in errors.items()), ordinary]


def _choose(offers: list[list[Offer]], budget: float) -> list[Offer] | None:
    """One offer per layer with the least total error within the budget; None if all exceed it."""
    costs = [[Item(offer.cost, -offer.error) for offer in layer] for layer in offers]
    numbers = choose(costs, budget, unit=offers[0][-1].cost / UNITS)
    return None if numbers is None else [layer[number] for layer, number in zip(offers, numbers)]


def _errors(
    model: Vit, converted: LinformerTransformer, projections: dict[int, list[Pair]], activations: Activations
) -> Iterator[dict[int, float]]:
    """For each layer, the estimated squared error of the last tokens by length, with all other layers exact."""
    middle = list(projections)[len(projections) // 2]
    last_target = activations.map(partial(last_tokens, model, 0), activations.original)
    for layer, (block, converted_block, arguments) in enumerate(
        zip(model.blocks, converted.blocks, block_arguments(model))
    ):
        target = activations.map(partial(after_attention, block, arguments), activations.original)
        weights = activations.weights(target)
        errors = {}
        for k, pairs in projections.items():
            converted_block.attn.set_projections(*pairs[layer])
            tokens = activations.map(partial(after_attention, converted_block, arguments), activations.original)
            errors[k] = relative_error(tokens, target, weights) ** 2
            if k == middle:
                tokens = activations.map(partial(after_mlp, block), tokens)
                last = activations.map(partial(last_tokens, model, layer + 1), tokens)
                last_error = last_tokens_error(last, last_target, model.num_prefix_tokens)
        # If pooling does not even change the layer's own tokens, no length loses anything.
        ratio = last_error / errors[middle] if errors[middle] > 0 else 0.0
        yield {k: ratio * error for k, error in errors.items()}
        activations.original = activations.map(partial(after_mlp, block), target)


def _flops(model: Vit, img_size: tuple[int, int] | None) -> int:
    """Operations of a forward pass on one image, of `img_size` or else the model's own size."""
    bare = copy.deepcopy(model)
    if img_size is not None:
        bare.set_input_size(img_size=img_size)
    bare.to("meta")
    if isinstance(bare, LinformerTransformer):
        for attention in attentions(bare):
            attention.fused_attn = True
    images = torch.empty(1, bare.in_chans, *bare.patch_embed.img_size, device="meta")
    return count_flops(bare, images, mode="forward")
