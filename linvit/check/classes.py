"""Sizes and colours of the images of each split.

What is wrong with the classes of a listing: empty, in one split only, spelt alike, of very different sizes.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from linvit.check.faults import LARGEST_IMBALANCE, Finding
from linvit.check.listing import Listing
from linvit.check.run import Measurements
from linvit.data.sources.base import split_names

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


def check_classes(listing: Listing) -> list[Finding]:
    """Findings about classes; splits without any, such as images without labels to predict on, are left alone."""
    splits = {split: counts for split, counts in listing.classes.items() if counts}
    return [*_empty(splits), *_in_some_splits(splits), *_spelt_alike(splits), *_imbalanced(splits)]


def training_split(listing: Listing) -> str:
    """The split that training takes, or the only or first one."""
    names = list(listing.classes)
    return next((name for name in split_names("train") if name in names), names[0])


def _empty(splits: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    return [
        Finding("empty_class", _place(split, name))
        for split, counts in splits.items()
        for name, count in counts.items()
        if count == 0
    ]


def _in_some_splits(splits: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    found = []
    for name in sorted(set().union(*splits.values())):
        having = [split for split, counts in splits.items() if name in counts]
        lacking = [split for split in splits if split not in having]
        if lacking:
            detail = f"not in {', '.join(lacking)}"
            found.append(Finding("class_in_one_split", _place(having[0], name), detail))
    return found


def _spelt_alike(splits: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    spellings: dict[str, dict[str, str]] = defaultdict(dict)
    for split, counts in splits.items():
        for name in counts:
            spellings[name.lower()].setdefault(name, _place(split, name))
    groups = [list(places.values()) for places in spellings.values() if len(places) > 1]
    return [Finding("class_case", first, "", tuple(rest)) for first, *rest in groups]


def _imbalanced(splits: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    found = []
    for split, counts in splits.items():
        filled = {name: count for name, count in counts.items() if count}
        if not filled:
            continue
        largest, smallest = max(filled, key=filled.__getitem__), min(filled, key=filled.__getitem__)
        if filled[largest] > LARGEST_IMBALANCE * filled[smallest]:
            detail = f"{filled[largest]:,} images of {largest}, {filled[smallest]:,} of {smallest}"
            found.append(Finding("class_imbalance", split or ".", detail))
    return found


def _place(split: str, name: str) -> str:
    return f"{split}/{name}" if split else name
