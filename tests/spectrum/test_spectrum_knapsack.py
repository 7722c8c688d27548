"""The knapsack against every combination."""

import itertools

import numpy as np
import pytest

from linvit.spectrum.knapsack import Item, choose


@pytest.mark.parametrize("budget", [10, 14, 20, 33, 1000])
def test_no_combination_within_the_budget_is_better(budget):
    rng = np.random.default_rng(budget)
    groups = [[Item(int(cost), float(rng.random())) for cost in rng.integers(2, 15, 4)] for _ in range(4)]
    found = choose(groups, budget, unit=1)
    affordable = [
        numbers
        for numbers in itertools.product(range(4), repeat=4)
        if sum(items[number].cost for items, number in zip(groups, numbers)) <= budget
    ]
    if not affordable:
        assert found is None
        return
    assert tuple(found) in affordable

    def value(numbers):
        return sum(items[number].value for items, number in zip(groups, numbers))

    assert value(found) == pytest.approx(max(map(value, affordable)))


def test_costs_are_rounded_up_to_units():
    groups = [[Item(1.0, 0.0), Item(2.1, 1.0)]]
    assert choose(groups, 3.0, unit=1.0) == [1]
    assert choose(groups, 2.9, unit=1.0) == [0]
    assert choose(groups, 2.9, unit=0.1) == [1]


def test_a_budget_below_the_cheapest_items_is_none():
    assert choose([[Item(2, 0.0)], [Item(3, 0.0)]], 4.9, unit=0.1) is None
