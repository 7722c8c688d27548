"""The multiple-choice knapsack: take one item from each group for the largest total value within a budget.

`linvit spectrum` and `linvit convert` plan projected lengths with it: a group is a layer, an item a length. Taking the
best value for its cost first would not work, since costs are not linear in k and ordinary attention is a jump.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Item(NamedTuple):
    """What an item costs and what it is worth."""

    cost: float
    value: float


def choose(groups: Sequence[Sequence[Item]], budget: float, *, unit: float) -> list[int] | None:
    """The index of the item to take from each group; None if even the cheapest items exceed the budget.

    Solved by dynamic programming over groups and costs. It is exact, except that the cost of an item beyond the
    cheapest of its group is rounded up to whole units, which leaves less than a unit per group unspent.
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
