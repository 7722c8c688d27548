"""How certain a figure is: percentile bootstrap over images (Efron and Tibshirani 1993, chapter 13)."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

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
