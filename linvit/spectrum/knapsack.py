"""The multiple-choice knapsack: one offer of each layer, of most value together, within a budget.

Taking what gives most value for its price first would not do: prices are not linear in k, and ordinary attention is a
jump.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


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
