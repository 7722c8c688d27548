"""Choose a projected length for each layer within a budget, so that attention keeps the most energy.

Each layer has choices: projected lengths and ordinary attention, with their operations and the share of the attention's
energy that they can keep. The best combination is found exactly, by a multiple-choice knapsack, which `linvit convert`
uses too. Taking the best value for its cost first would not work, since costs are not linear in k and ordinary
attention is a jump.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from linvit.measure.timing import count_flops
from linvit.model.eva import LinformerEva, rotary_of_layers
from linvit.model.projections import GridSize
from linvit.model.projections.grid import factor_pair
from linvit.model.sharing import Share
from linvit.model.vit import LinformerViT
from linvit.spectrum.result import Spectrum

# Fewer keys cost hardly less, and a projection that is fitted, or pools, keeps less than the best of its rank.
MIN_K = 16
# Largest ratio of the sides of the cells into which k divides the grid.
MAX_CELL_RATIO = 1.5
# Each length is at least this many times the one before it.
LENGTH_STEP = 1.15
# Operations are counted in units of this fraction of a layer's ordinary attention.
UNITS = 1000


class Choice(NamedTuple):
    """A projected length for one layer (None is ordinary attention).

    `flops` are the operations on one image, those of ordinary attention are `ordinary_flops`; `energy` is the share of
    energy that can be kept.
    """

    k: int | None
    flops: int
    energy: float
    ordinary_flops: int


@dataclass(frozen=True)
class Plan:
    """A choice for each layer, and the whole model's operations on one image, with them and with ordinary attention."""

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
        """Layers and totals, for JSON."""
        layers = [layer._asdict() for layer in self.layers]
        totals = {name: getattr(self, name) for name in ("flops", "ordinary_flops", "speedup", "energy")}
        return {**totals, "layers": layers}


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
    """Projected length of each layer, None for ordinary attention, for the keyword `k` of `LinformerViT`.

    Give one budget. `speedup` and `flops` count operations of the whole model; time follows operations for long
    sequences. Within the budget, the mean over layers of the energy kept is maximal, so a larger budget never keeps
    less. Lengths are products k_h · k_w whose cells are nearly square, in steps of at least 15 %.

    Args:
        spectrum: spectrum of the model, at the image size to plan for.
        speedup: how many times fewer operations than with ordinary attention in every layer.
        flops: share of these operations that may be spent, between 0 and 1; the same as a speedup of 1 / flops.
        energy: share of its attention's energy that every layer keeps, mean over heads, by the best matrix of rank k.
        projection: kind of E and F, for their cost.
        share: sharing of E and F, for their cost; with "layerwise" all lengths are the same.
        min_k: the smallest length.

    Raises ValueError unless exactly one budget is given, and if it is out of range or cannot be met.
    """
    budget = {"speedup": speedup, "flops": flops, "energy": energy}
    return make_plan(spectrum, budget, projection=projection, share=share, min_k=min_k).k


def make_plan(
    spectrum: Spectrum, budget: Mapping[str, float | None], *, projection: str, share: Share, min_k: int
) -> Plan:
    """The plan of `plan_k` with its cost and energy; `budget` holds speedup, flops or energy under its name.

    Raises ValueError as `plan_k` does.
    """
    given = {name: value for name, value in budget.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"a plan needs exactly one budget (speedup, flops or energy), but {len(given)} are given")
    ((name, value),) = given.items()
    layers = layer_choices(spectrum, projection=projection, share=share, min_k=min_k)
    combinations = _combinations(layers, share)
    if name == "energy":
        if not 0 < value <= 1:
            raise ValueError(f"energy={value:g} is not a share: give more than 0 and at most 1")
        plans = [[_cheapest(choices, value) for choices in combination] for combination in combinations]
        return min((_plan(spectrum, plan) for plan in plans), key=lambda plan: plan.flops)
    if not (value >= 1 if name == "speedup" else 0 < value <= 1):
        raise ValueError(f"{name}={value:g} is not a valid budget: give a speedup above 1, or flops between 0 and 1")
    ordinary_flops = _plan(spectrum, layers[0][-1:] * len(layers)).ordinary_flops
    max_flops = ordinary_flops * (1 / value if name == "speedup" else value)
    cheapest = _plan(spectrum, [choices[0] for choices in layers])
    if cheapest.flops > max_flops:
        raise ValueError(
            f"{name}={value:g} cannot be reached: k={layers[0][0].k} in every layer gives a speedup of "
            f"{cheapest.speedup:.2f}; set a larger budget, lower min_k, or use larger images"
        )
    plans = [_spend(combination, max_flops - spectrum.flops_besides_attention) for combination in combinations]
    return max((_plan(spectrum, plan) for plan in plans if plan), key=lambda plan: plan.energy)


def uniform_plans(spectrum: Spectrum, *, projection: str, share: Share, min_k: int) -> list[Plan]:
    """Plans with the same length in every layer, from the cheapest to ordinary attention."""
    layers = layer_choices(spectrum, projection=projection, share=share, min_k=min_k)
    return [_plan(spectrum, list(choices)) for choices in zip(*layers)]


def model_kwargs(spectrum: Spectrum, plan: Plan, *, projection: str, share: Share) -> dict[str, Any]:
    """The keywords with which a registered model follows the plan."""
    return {"img_size": list(spectrum.img_size), "k": plan.k, "projection": projection, "share": share}


def _plan(spectrum: Spectrum, layers: list[Choice]) -> Plan:
    elsewhere = spectrum.flops_besides_attention
    ordinary = elsewhere + sum(layer.ordinary_flops for layer in layers)
    return Plan(layers, elsewhere + sum(layer.flops for layer in layers), ordinary)


def _combinations(layers: list[list[Choice]], share: Share) -> list[list[list[Choice]]]:
    """The choices of every layer, separately for each length if all layers share one E, and thus one length."""
    if share != "layerwise":
        return [layers]
    lengths = [choice.k for choice in layers[0]]
    return [[[choice for choice in choices if choice.k in (k, None)] for choices in layers] for k in lengths]


def _spend(layers: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """The choices with the most energy within the budget of operations; empty if even the cheapest exceed it."""
    items = [[Item(choice.flops, choice.energy) for choice in choices] for choices in layers]
    numbers = choose(items, budget, unit=layers[0][-1].ordinary_flops / UNITS)
    return [choices[number] for choices, number in zip(layers, numbers or ())]


def _cheapest(choices: Sequence[Choice], energy: float) -> Choice:
    return next(choice for choice in choices if choice.energy >= energy)


def layer_choices(spectrum: Spectrum, *, projection: str, share: Share, min_k: int) -> list[list[Choice]]:
    """The choices of each layer, from the fewest operations to the most: projected lengths, then ordinary attention.

    `energy` is the mean over heads of the share that the k largest singular values have: k projected keys cannot keep
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
    """Projected lengths k_h · k_w, ascending, whose cells on the grid are nearly square."""
    height, width = grid_size
    products = {
        k_h * k_w for k_h in range(1, height + 1) for k_w in range(1, width + 1) if min_k <= k_h * k_w < height * width
    }
    lengths: list[int] = []
    for k in sorted(products):
        k_h, k_w = factor_pair(k, grid_size)
        ratio = (height / k_h) / (width / k_w)
        if max(ratio, 1 / ratio) <= MAX_CELL_RATIO and (not lengths or k >= LENGTH_STEP * lengths[-1]):
            lengths.append(k)
    return lengths


def attention_flops(spectrum: Spectrum, k: int | None, *, projection: str, share: Share) -> int:
    """Operations of one attention layer on one image; two per multiply-add, counted as in `linvit bench`.

    Raises ValueError if the projection does not support the sharing.
    """
    return _count(
        spectrum.grid_size,
        spectrum.num_prefix_tokens,
        spectrum.embed_dim,
        spectrum.num_heads,
        k,
        projection,
        share,
        spectrum.rotary,
    )


@cache
def _count(
    grid_size: GridSize,
    num_prefix: int,
    embed_dim: int,
    num_heads: int,
    k: int | None,
    projection: str,
    share: Share,
    rotary: bool,
) -> int:
    common: dict[str, Any] = dict(
        # An image with one pixel per patch.
        img_size=grid_size,
        patch_size=1,
        embed_dim=embed_dim,
        depth=1,
        num_heads=num_heads,
        class_token=num_prefix > 0,
        global_pool="avg",
        num_classes=0,
        k=[k],
        projection=projection,
        share=share,
        weight_init="skip",
    )
    registers = max(num_prefix - 1, 0)
    with torch.device("meta"):
        model = (
            LinformerEva(**common, num_reg_tokens=registers, use_rot_pos_emb=True)
            if rotary
            else LinformerViT(**common, reg_tokens=registers)
        )
        tokens = torch.empty(1, num_prefix + grid_size[0] * grid_size[1], embed_dim)
        rope = rotary_of_layers(model)[0]
    arguments = {} if rope is None else {"rope": rope}
    return count_flops(model.blocks[0].attn, tokens, mode="forward", **arguments)


def _energy_kept(spectrum: Spectrum, layer: int, k: int) -> float:
    cumulative = spectrum.cumulative_energy[layer]
    return float(np.mean(cumulative[:, min(k, cumulative.shape[1]) - 1]))


class Item(NamedTuple):
    """A member of a knapsack's group, such as a length for a layer: what it costs and what it is worth."""

    cost: float
    value: float


def choose(groups: Sequence[Sequence[Item]], budget: float, *, unit: float) -> list[int] | None:
    """Solve the multiple-choice knapsack: take one item from each group for the largest total value within the budget.

    Returns the index of the item to take from each group, or None if even the cheapest items exceed the budget. Solved
    by dynamic programming over groups and costs. It is exact, except that the cost of an item beyond the cheapest of
    its group is rounded up to whole units, which leaves less than a unit per group unspent.
    """
    cheapest = [min(item.cost for item in items) for items in groups]
    prices = [[math.ceil((item.cost - least) / unit) for item in items] for items, least in zip(groups, cheapest)]
    capacity = math.floor((budget - sum(cheapest)) / unit)
    if capacity < 0:
        return None
    # More than the sum of the highest prices cannot be spent.
    capacity = min(capacity, sum(map(max, prices)))
    # The best value by units spent, of the groups so far.
    best = np.zeros(capacity + 1)
    taken = []
    for items, group_prices in zip(groups, prices):
        values = np.full((len(items), capacity + 1), -np.inf)
        for row, item, price in zip(values, items, group_prices):
            row[price:] = best[: max(capacity + 1 - price, 0)] + item.value
        best = values.max(0)
        taken.append(values.argmax(0))
    chosen = []
    for group_prices, numbers in zip(prices[::-1], taken[::-1]):
        chosen.append(int(numbers[capacity]))
        capacity -= group_prices[chosen[-1]]
    return chosen[::-1]
