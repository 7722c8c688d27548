"""Uncertainty of a score, and of the difference between two models on the same images.

Intervals are percentile bootstraps over images (Efron and Tibshirani 1993, chapter 13).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from linvit.evaluation.metrics import ImageResults

# Coverage of the intervals, in percent.
LEVEL = 95

Statistic = Callable[[np.ndarray], Mapping[str, float]]


def bootstrap(
    statistic: Statistic, num_images: int, *, num_resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """The central 95 % of each score over resamples of the images, with replacement; empty without resamples.

    Args:
        statistic: from the number of times each image counts, (N,), to scores by name.
        seed: seed of the resamples; scores with the same seed and number of images share them.
    """
    values: dict[str, list[float]] = {}
    for counts in resamples(num_images, num_resamples=num_resamples, seed=seed):
        for name, value in statistic(counts).items():
            values.setdefault(name, []).append(value)
    tail = (100 - LEVEL) / 2
    bounds = {name: np.percentile(drawn, [tail, 100 - tail]).tolist() for name, drawn in values.items()}
    return {name: (low, high) for name, (low, high) in bounds.items()}


def resamples(num_images: int, *, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """For each resample, how often each of the N images is drawn in N draws, (N,)."""
    generator = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield np.bincount(generator.integers(num_images, size=num_images), minlength=num_images)


def compare(results: ImageResults, baseline: ImageResults, *, num_resamples: int, seed: int) -> dict[str, Any]:
    """Differences between two results on the same N images in the same order.

    `top1_difference` is in percentage points, `loss_difference` in nats. `only_here` and `only_baseline` count the
    images that only one of the two classifies correctly; `mcnemar_p` tests whether the two counts differ by chance.
    """
    assert len(results.labels) == len(baseline.labels)
    here, there = results.correct.numpy(), baseline.correct.numpy()
    hits = here.astype(float) - there
    losses = (results.losses - baseline.losses).numpy()

    def differences(counts: np.ndarray) -> dict[str, float]:
        total = counts.sum()
        return {
            "top1_difference": 100 * float(counts @ hits / total),
            "loss_difference": float(counts @ losses / total),
        }

    only_here, only_baseline = int((here & ~there).sum()), int((there & ~here).sum())
    return {
        **differences(np.ones(len(hits))),
        "confidence": bootstrap(differences, len(hits), num_resamples=num_resamples, seed=seed),
        "only_here": only_here,
        "only_baseline": only_baseline,
        "mcnemar_p": mcnemar(only_here, only_baseline),
        "num_images": len(hits),
    }


def mcnemar(only_one: int, only_other: int) -> float:
    """p-value of McNemar's exact test, two-sided, from the numbers of images that one model alone classifies right."""
    if only_one == only_other == 0:
        return 1.0
    # SciPy's statistics take a while to import.
    from scipy.stats import binomtest

    return float(binomtest(min(only_one, only_other), only_one + only_other).pvalue)
