from statistics import NormalDist

import numpy as np
import pytest

from linvit.evaluation.uncertainty import bootstrap


def mean_of(values: np.ndarray):  # type: ignore[no-untyped-def]
    return lambda counts: {"mean": float(counts @ values / counts.sum())}


def test_the_interval_of_a_share_is_the_binomials() -> None:
    hits = np.arange(400) < 300
    low, high = bootstrap(mean_of(hits), 400, num_resamples=2000, seed=0)["mean"]
    reach = NormalDist().inv_cdf(0.975) * (0.75 * 0.25 / 400) ** 0.5
    assert (low, high) == (pytest.approx(0.75 - reach, abs=0.006), pytest.approx(0.75 + reach, abs=0.006))


def test_seeds_repeat() -> None:
    values = np.random.default_rng(1).normal(size=50)
    first, again, other = (bootstrap(mean_of(values), 50, num_resamples=20, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        values = generator.exponential(size=80)
        low, high = bootstrap(mean_of(values), 80, num_resamples=200, seed=0)["mean"]
        covered.append(low <= 1 <= high)
    assert 0.89 <= np.mean(covered) <= 0.98


def test_no_resamples_are_no_intervals() -> None:
    assert bootstrap(mean_of(np.ones(3)), 3, num_resamples=0, seed=0) == {}
