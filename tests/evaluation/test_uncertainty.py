"""Bootstrap intervals cover the truth as often as they claim; comparisons are paired."""

from math import comb
from statistics import NormalDist

import numpy as np
import pytest
import torch
from random_results import random_logits, recorded

from linvit.evaluation.uncertainty import Statistic, bootstrap, compare, mcnemar


def mean_of(values: np.ndarray) -> Statistic:
    return lambda counts: {"mean": float(counts @ values / counts.sum())}


def test_the_interval_of_a_share_is_the_binomials() -> None:
    hits = np.arange(400) < 300
    low, high = bootstrap(mean_of(hits), 400, num_resamples=2000, seed=0)["mean"]
    reach = NormalDist().inv_cdf(0.975) * (0.75 * 0.25 / 400) ** 0.5
    assert (low, high) == (pytest.approx(0.75 - reach, abs=0.006), pytest.approx(0.75 + reach, abs=0.006))


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(1).normal(size=50)
    first, again, other = (bootstrap(mean_of(values), 50, num_resamples=20, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_intervals_cover_the_truth_as_often_as_they_claim() -> None:
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        values = generator.exponential(size=80)
        low, high = bootstrap(mean_of(values), 80, num_resamples=200, seed=0)["mean"]
        covered.append(low <= 1 <= high)
    assert 0.89 <= np.mean(covered) <= 0.98


def test_no_resamples_give_no_intervals() -> None:
    assert bootstrap(mean_of(np.ones(3)), 3, num_resamples=0, seed=0) == {}


@pytest.mark.parametrize(("one", "other"), [(0, 0), (0, 1), (5, 1), (1, 5), (12, 12), (30, 17), (3, 40)])
def test_mcnemar_is_the_exact_sign_test(one: int, other: int) -> None:
    num = one + other
    tail = sum(comb(num, k) for k in range(min(one, other) + 1)) / 2**num
    assert mcnemar(one, other) == pytest.approx(min(1.0, 2 * tail), rel=1e-12)


def test_mcnemar_with_many_images_approaches_the_normal_approximation() -> None:
    one, other = 500_000, 501_000
    expected = 2 * NormalDist().cdf(-(other - one - 1) / (one + other) ** 0.5)
    assert mcnemar(one, other) == pytest.approx(expected, rel=1e-4)


def test_differences_are_paired() -> None:
    (logits, labels), (others, _) = random_logits(seed=0), random_logits(seed=1)
    one, other = recorded(logits, labels), recorded(others, labels)
    found = compare(one, other, num_resamples=100, seed=0)
    right, wrong = one.correct & ~other.correct, ~one.correct & other.correct
    assert (found["only_here"], found["only_baseline"]) == (int(right.sum()), int(wrong.sum()))
    assert found["top1_difference"] == pytest.approx(100 * (found["only_here"] - found["only_baseline"]) / 60)
    assert found["loss_difference"] == pytest.approx(float((one.losses - other.losses).mean()))
    low, high = found["confidence"]["top1_difference"]
    assert low < found["top1_difference"] < high
    back = compare(other, one, num_resamples=100, seed=0)
    assert back["confidence"]["loss_difference"] == pytest.approx(
        [-x for x in found["confidence"]["loss_difference"]][::-1]
    )
    assert back["mcnemar_p"] == found["mcnemar_p"]


def test_a_model_does_not_differ_from_itself() -> None:
    results = recorded(*random_logits())
    found = compare(results, results, num_resamples=50, seed=0)
    assert found["mcnemar_p"] == 1
    assert found["confidence"] == {"top1_difference": (0, 0), "loss_difference": (0, 0)}


def test_a_constant_gain_has_an_interval_of_no_width() -> None:
    logits, labels = random_logits()
    worse = recorded(logits, labels)
    better = recorded(logits, labels)
    torch.sub(worse.losses, 0.01, out=better.losses)
    low, high = compare(better, worse, num_resamples=50, seed=0)["confidence"]["loss_difference"]
    assert (low, high) == (pytest.approx(-0.01), pytest.approx(-0.01))
