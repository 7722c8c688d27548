"""Sizes and colours of the images of each split."""

from typing import Any

import numpy as np

from linvit.data.check.reading import Measurements

# Bins of the histogram of aspects; a mirrored scale, since 1:2 is as far from square as 2:1.
_ASPECTS = (0, 1 / 4, 1 / 2, 2 / 3, 3 / 4, 0.95, 1.05, 4 / 3, 3 / 2, 2, 4, np.inf)

# Images that mean and deviation are taken of: more would move them by less than 0.01.
_MOST_COLOURS = 1_000


def describe_sizes(measurements: Measurements, chosen: np.ndarray) -> dict[str, Any]:
    """Smallest, median and largest width, height and aspect (width / height) of the images `chosen` (N,) bool.

    With them histograms of the shorter side, in doubling bins, and of the aspect, as rows of lower edge and count.
    """
    sizes = measurements.sizes[chosen & measurements.decoded]
    if not len(sizes):
        return {}
    width, height = sizes.T
    aspect = width / height
    shorter = sizes.min(axis=1)
    doublings = 2.0 ** np.arange(np.floor(np.log2(shorter.min())), np.floor(np.log2(shorter.max())) + 2)
    return {
        "width": _spread(width),
        "height": _spread(height),
        "aspect": _spread(aspect),
        "megapixels": round(float((width.astype(np.int64) * height).sum() / 1e6), 1),
        "shorter_side_histogram": _histogram(shorter, doublings),
        "aspect_histogram": _histogram(aspect, np.array(_ASPECTS)),
    }


def drawn_for_colours(chosen: np.ndarray) -> np.ndarray:
    """Of the images `chosen` (N,) bool those whose colours are measured: all or, evenly spread, a thousand."""
    places = np.flatnonzero(chosen)
    drawn = np.zeros_like(chosen)
    drawn[places[np.linspace(0, len(places) - 1, min(len(places), _MOST_COLOURS)).astype(int)]] = True
    return drawn


def mean_and_std(measurements: Measurements, chosen: np.ndarray) -> dict[str, Any]:
    """Mean and standard deviation per channel, 0 to 1, over 64 × 64 pixels of every image of `chosen` (N,) bool.

    Every image weighs the same, whatever its size, as it does in training.
    """
    chosen = chosen & measurements.decoded
    if not chosen.any():
        return {}
    means = measurements.means[chosen].mean(axis=0, dtype=np.float64)
    squares = measurements.squares[chosen].mean(axis=0, dtype=np.float64)
    deviations = np.sqrt(np.maximum(squares - means**2, 0))
    colours = {
        name: [round(float(value) / 255, 4) for value in values]
        for name, values in (("mean", means), ("std", deviations))
    }
    return {"num_images": int(chosen.sum()), **colours}


def _spread(values: np.ndarray) -> dict[str, float]:
    return {name: round(float(of(values)), 3) for name, of in (("min", np.min), ("median", np.median), ("max", np.max))}


def _histogram(values: np.ndarray, edges: np.ndarray) -> list[tuple[float, int]]:
    counts, _ = np.histogram(values, edges)
    return [(round(float(edge), 3), int(count)) for edge, count in zip(edges, counts)]
