"""How certain a figure is: percentile bootstrap over images (Efron and Tibshirani 1993, chapter 13).

Two models on the same images: whether the difference is more than the luck of which images they were.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from linvit.evaluation.metrics import ImageResults

LEVEL = 95

Statistic = Callable[[np.ndarray], Mapping[str, float]]


def bootstrap(
    statistic: Statistic, num_images: int, *, num_resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """The central 95 % of each figure over resamples of the images, with replacement; empty without resamples.

    Args:
        statistic: from how often each image counts, (N,), to figures by name.
        seed: of the resamples, so that figures of the same images are resampled alike.
    """
    drawn: dict[str, list[float]] = {}
    for counts in resamples(num_images, num_resamples=num_resamples, seed=seed):
        for name, value in statistic(counts).items():
            drawn.setdefault(name, []).append(value)
    tail = (100 - LEVEL) / 2
    bounds = {name: np.percentile(values, [tail, 100 - tail]).tolist() for name, values in drawn.items()}
    return {name: (low, high) for name, (low, high) in bounds.items()}


def resamples(num_images: int, *, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of N images is drawn in N draws, (N,), again and again."""
    generator = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield np.bincount(generator.integers(num_images, size=num_images), minlength=num_images)


def compare(results: ImageResults, baseline: ImageResults, *, num_resamples: int, seed: int) -> dict[str, Any]:
    """How `results` differ from the baseline's, of the same N images in the same order.

    `top1_difference` is in points, `loss_difference` in nats; `only_here` and `only_baseline` count the images that
    one alone has right, and `mcnemar_p` is how likely a split so uneven is if both are equally good.
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
    """McNemar's exact test, two-sided: the probability of a split at least so uneven of so many fair coins."""
    num, fewer = only_one + only_other, min(only_one, only_other)
    if only_one == only_other:
        return 1.0
    drawn = torch.arange(fewer + 1, dtype=torch.float64)
    log_choose = math.lgamma(num + 1) - torch.lgamma(drawn + 1) - torch.lgamma(num - drawn + 1)
    return min(1.0, 2 * math.exp(torch.logsumexp(log_choose, 0).item() - num * math.log(2)))
