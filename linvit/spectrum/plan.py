"""The multiple-choice knapsack: one offer of each layer, of most value together, within a budget.

Taking what gives most value for its price first would not do: prices are not linear in k, and ordinary attention is a
jump.

What a layer costs at each projected length, and which lengths are worth trying.

A projected length for each layer, within a budget.

Each layer has choices: operations, and the share of its attention's energy that is kept at most. Which to take in each
layer so that the sum of the energies is largest within a number of operations is small enough to be solved exactly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from linvit.measure.flops import count_flops
from linvit.model.projections import GridSize
from linvit.model.projections.grid import factor_pair
from linvit.model.vit import LinformerViT, Share
from linvit.spectrum.result import Spectrum


class Offer(NamedTuple):
    """What an offer costs, and what it is worth."""

    cost: float
    value: float


def choose(layers: Sequence[Sequence[Offer]], budget: float, *, unit: float) -> list[int] | None:
    """Which offer to take in each layer; None where not even the cheapest are within the budget.

    Exact, by dynamic programming over layers and prices, but that prices are counted in units: what offers cost beyond
    the cheapest is rounded up to them, so that less than a unit a layer is left unspent.
    """
    least = [min(offer.cost for offer in offers) for offers in layers]
    prices = [[math.ceil((offer.cost - low) / unit) for offer in offers] for offers, low in zip(layers, least)]
    capacity = math.floor((budget - sum(least)) / unit)
    if capacity < 0:
        return None
    # More than everything costs buys nothing.
    capacity = min(capacity, sum(map(max, prices)))
    value = np.zeros(capacity + 1)
    taken = []
    for offers, own in zip(layers, prices):
        values = np.full((len(offers), capacity + 1), -np.inf)
        for row, offer, price in zip(values, offers, own):
            row[price:] = value[: max(capacity + 1 - price, 0)] + offer.value
        value = values.max(0)
        taken.append(values.argmax(0))
    chosen = []
    for own, best in zip(prices[::-1], taken[::-1]):
        chosen.append(int(best[capacity]))
        capacity -= own[chosen[-1]]
    return chosen[::-1]


# Cells that k divides the grid into are at most so many times longer than wide, or wider than long.
LONGEST_CELL = 1.5
# Each length tried is at least this many times the one before it.
STEP = 1.15


class Choice(NamedTuple):
    """A projected length for one layer (None: ordinary attention): operations on one image, share of energy kept."""

    k: int | None
    flops: int
    energy: float
    # What ordinary attention takes.
    ordinary_flops: int


def layer_choices(spectrum: Spectrum, *, projection: str, share: Share, min_k: int) -> list[list[Choice]]:
    """For each layer what it can do, from the least operations to the most: projected lengths, then ordinary attention.

    `energy` is the mean over heads of the share that the k largest singular values have: no k projected keys can keep
    more. Lengths that cost as much as ordinary attention are left out.
    """
    ordinary = attention_flops(spectrum, None, projection=projection, share=share)
    cheaper: dict[int, int] = {}
    for k in lengths_to_try(spectrum.grid_size, min_k=min_k):
        flops = attention_flops(spectrum, k, projection=projection, share=share)
        if flops >= ordinary:
            break
        cheaper[k] = flops
    return [
        [
            *(Choice(k, flops, _energy_kept(spectrum, layer, k), ordinary) for k, flops in cheaper.items()),
            Choice(None, ordinary, 1.0, ordinary),
        ]
        for layer in range(spectrum.num_layers)
    ]


def lengths_to_try(grid_size: GridSize, *, min_k: int) -> list[int]:
    """Projected lengths k_h · k_w, ascending, whose cells on the grid are near square."""
    height, width = grid_size
    products = {
        k_h * k_w for k_h in range(1, height + 1) for k_w in range(1, width + 1) if min_k <= k_h * k_w < height * width
    }
    lengths: list[int] = []
    for k in sorted(products):
        k_h, k_w = factor_pair(k, grid_size)
        shape = (height / k_h) / (width / k_w)
        if max(shape, 1 / shape) <= LONGEST_CELL and (not lengths or k >= STEP * lengths[-1]):
            lengths.append(k)
    return lengths


def attention_flops(spectrum: Spectrum, k: int | None, *, projection: str, share: Share) -> int:
    """Operations of one attention layer on one image; two per multiply-add, as `linvit bench` counts them.

    Raises ValueError for a projection and a share that do not go together.
    """
    return _count(
        spectrum.grid_size, spectrum.num_prefix_tokens, spectrum.embed_dim, spectrum.num_heads, k, projection, share
    )


@cache
def _count(
    grid_size: GridSize, num_prefix: int, embed_dim: int, num_heads: int, k: int | None, projection: str, share: Share
) -> int:
    with torch.device("meta"):
        # One layer on a picture of a pixel a patch.
        model = LinformerViT(
            img_size=grid_size,
            patch_size=1,
            embed_dim=embed_dim,
            depth=1,
            num_heads=num_heads,
            class_token=num_prefix > 0,
            reg_tokens=max(num_prefix - 1, 0),
            global_pool="avg",
            num_classes=0,
            k=[k],
            projection=projection,
            share=share,
            weight_init="skip",
        )
        tokens = torch.empty(1, num_prefix + grid_size[0] * grid_size[1], embed_dim)
    return count_flops(model.blocks[0].attn, tokens, mode="forward")


def _energy_kept(spectrum: Spectrum, layer: int, k: int) -> float:
    cumulative = spectrum.cumulative_energy[layer]
    return float(np.mean(cumulative[:, min(k, cumulative.shape[1]) - 1]))


# Fewer keys cost hardly less, and a projection that is fitted, or pools, keeps less than the best of its rank.
MIN_K = 16
# Into which ordinary attention of one layer is divided to count operations.
UNITS = 1000


def plan_k(
    spectrum: Spectrum,
    *,
    speedup: float | None = None,
    flops: float | None = None,
    energy: float | None = None,
    projection: str = "separable",
    share: Share = "kv",
    min_k: int = MIN_K,
) -> list[int | None]:
    """Projected length of each layer, None for ordinary attention, as the keyword `k` of `LinformerViT` takes it.

    One budget is given. `speedup` and `flops` are of the whole model, counted in operations: time follows them where
    sequences are long. Within it the mean over layers of the energy kept is as large as it can be; more budget never
    keeps less. Lengths are products k_h · k_w whose cells are near square, in steps of at least 15 %.

    Args:
        spectrum: of the model, at the image size that the plan is for.
        speedup: how many times fewer operations than with ordinary attention in every layer.
        flops: share of these operations that may be spent, between 0 and 1: the same as a speedup of 1 / flops.
        energy: share of its attention's energy that every layer keeps, mean over heads, by the best matrix of rank k.
        projection: kind of E and F, for what it costs.
        share: who shares E and F, for what it costs; with "layerwise" all lengths are the same.
        min_k: the least length.

    Raises ValueError where not exactly one budget is given, or one that cannot be kept.
    """
    budget = {"speedup": speedup, "flops": flops, "energy": energy}
    return make_plan(spectrum, budget, projection=projection, share=share, min_k=min_k).k


@dataclass(frozen=True)
class Plan:
    """What each layer does, and the operations of the whole model on one image, so and with ordinary attention."""

    layers: list[Choice]
    flops: int
    ordinary_flops: int

    @property
    def k(self) -> list[int | None]:
        """Projected length of each layer, None for ordinary attention."""
        return [layer.k for layer in self.layers]

    @property
    def speedup(self) -> float:
        """How many times fewer operations than with ordinary attention in every layer."""
        return self.ordinary_flops / self.flops

    @property
    def energy(self) -> float:
        """Mean over layers of the share of energy kept."""
        return sum(layer.energy for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        layers = [layer._asdict() for layer in self.layers]
        totals = {name: getattr(self, name) for name in ("flops", "ordinary_flops", "speedup", "energy")}
        return {**totals, "layers": layers}


def make_plan(
    spectrum: Spectrum, budget: Mapping[str, float | None], *, projection: str, share: Share, min_k: int
) -> Plan:
    """`plan_k`, and what it costs and keeps; `budget` has one of speedup, flops and energy, by its name."""
    given = {name: value for name, value in budget.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"a plan needs one budget, speedup, flops or energy: {len(given)} are given")
    ((name, value),) = given.items()
    layers = layer_choices(spectrum, projection=projection, share=share, min_k=min_k)
    offers = _offers(layers, share)
    if name == "energy":
        if not 0 < value <= 1:
            raise ValueError(f"energy={value:g} is no share: give more than 0 and at most 1")
        plans = [[_cheapest(choices, value) for choices in offer] for offer in offers]
        return min((_plan(spectrum, plan) for plan in plans), key=lambda plan: plan.flops)
    if not (value >= 1 if name == "speedup" else 0 < value <= 1):
        raise ValueError(f"{name}={value:g} is no budget: give a speedup above 1, or flops between 0 and 1")
    spent = _plan(spectrum, layers[0][-1:] * len(layers)).ordinary_flops * (1 / value if name == "speedup" else value)
    least = _plan(spectrum, [choices[0] for choices in layers])
    if least.flops > spent:
        raise ValueError(
            f"{name}={value:g} cannot be reached: k={layers[0][0].k} in every layer is a speedup of "
            f"{least.speedup:.2f}; ask for less, lower min_k, or take larger images"
        )
    plans = [_spend(offer, spent - spectrum.flops_besides_attention) for offer in offers]
    return max((_plan(spectrum, plan) for plan in plans if plan), key=lambda plan: plan.energy)


def uniform_plans(spectrum: Spectrum, *, projection: str, share: Share, min_k: int) -> list[Plan]:
    """One length in every layer: a plan for each length, from the cheapest, and ordinary attention."""
    layers = layer_choices(spectrum, projection=projection, share=share, min_k=min_k)
    return [_plan(spectrum, list(choices)) for choices in zip(*layers)]


def model_kwargs(spectrum: Spectrum, plan: Plan, *, projection: str, share: Share) -> dict[str, Any]:
    """The keywords that make a registered model follow the plan."""
    return {"img_size": list(spectrum.img_size), "k": plan.k, "projection": projection, "share": share}


def _plan(spectrum: Spectrum, layers: list[Choice]) -> Plan:
    elsewhere = spectrum.flops_besides_attention
    ordinary = elsewhere + sum(layer.ordinary_flops for layer in layers)
    return Plan(layers, elsewhere + sum(layer.flops for layer in layers), ordinary)


def _offers(layers: list[list[Choice]], share: Share) -> list[list[list[Choice]]]:
    """What may be chosen from together: everything, or, with one E for all layers, one length or ordinary attention."""
    if share != "layerwise":
        return [layers]
    lengths = [choice.k for choice in layers[0]]
    return [[[choice for choice in choices if choice.k in (k, None)] for choices in layers] for k in lengths]


def _spend(layers: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """The choices of most energy that cost no more than the budget; nothing where not even the cheapest fit."""
    offers = [[Offer(choice.flops, choice.energy) for choice in choices] for choices in layers]
    numbers = choose(offers, budget, unit=layers[0][-1].ordinary_flops / UNITS)
    return [choices[number] for choices, number in zip(layers, numbers or ())]


def _cheapest(choices: Sequence[Choice], energy: float) -> Choice:
    return next(choice for choice in choices if choice.energy >= energy)
