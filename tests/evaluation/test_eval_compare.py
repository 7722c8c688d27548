from math import comb

import pytest
import torch
from random_results import random_logits, recorded

from linvit.evaluation.uncertainty import compare, mcnemar


@pytest.mark.parametrize(("one", "other"), [(0, 0), (0, 1), (5, 1), (1, 5), (12, 12), (30, 17), (3, 40)])
def test_mcnemar_is_the_exact_sign_test(one: int, other: int) -> None:
    num = one + other
    tail = sum(comb(num, k) for k in range(min(one, other) + 1)) / 2**num
    assert mcnemar(one, other) == pytest.approx(min(1.0, 2 * tail), rel=1e-12)


def test_mcnemar_of_many_is_near_the_normal_approximation() -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(500_000, 1_001_000).pvalue
    assert mcnemar(500_000, 501_000) == pytest.approx(expected, rel=1e-6)


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


def test_a_model_is_not_different_from_itself() -> None:
    results = recorded(*random_logits())
    found = compare(results, results, num_resamples=50, seed=0)
    assert found["mcnemar_p"] == 1
    assert found["confidence"] == {"top1_difference": (0, 0), "loss_difference": (0, 0)}


def test_a_constant_gain_is_certain_though_each_loss_is_not() -> None:
    logits, labels = random_logits()
    worse = recorded(logits, labels)
    better = recorded(logits, labels)
    torch.sub(worse.losses, 0.01, out=better.losses)
    low, high = compare(better, worse, num_resamples=50, seed=0)["confidence"]["loss_difference"]
    assert (low, high) == (pytest.approx(-0.01), pytest.approx(-0.01))
