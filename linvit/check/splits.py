"""Statistics of each split's images, and problems with its classes."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from linvit.check.faults import LARGEST_IMBALANCE, Finding
from linvit.check.listing import Listing
from linvit.check.reader import Measurements
from linvit.data.sources.base import split_names

# Bin edges of the aspect ratio's histogram, symmetric because 1:2 is as far from square as 2:1.
_ASPECTS = (0, 1 / 4, 1 / 2, 2 / 3, 3 / 4, 0.95, 1.05, 4 / 3, 3 / 2, 2, 4, np.inf)

# Images used for mean and deviation. More would change them by less than 0.01.
_MAX_COLOUR_IMAGES = 1_000


# 14-bit data in 16-bit files have this many grey levels.
_FEWEST_LEVELS = 64


def training_split(listing: Listing) -> str:
    """The split that training uses, otherwise the first one."""
    names = list(listing.classes)
    return next((name for name in split_names("train") if name in names), names[0])


def describe_sizes(measurements: Measurements, selected: np.ndarray) -> dict[str, Any]:
    """Minimum, median and maximum of width, height and aspect ratio (width / height) of `selected` images, (N,) bool.

    Includes histograms of the shorter side, in doubling bins, and of the aspect ratio, as rows of lower edge and count.
    """
    sizes = measurements.sizes[selected & measurements.decoded]
    if not len(sizes):
        return {}
    width, height = sizes.T
    aspect = width / height
    shorter = sizes.min(axis=1)
    doublings = 2.0 ** np.arange(np.floor(np.log2(shorter.min())), np.floor(np.log2(shorter.max())) + 2)
    return {
        "width": _range(width),
        "height": _range(height),
        "aspect": _range(aspect),
        "megapixels": round(float((width.astype(np.int64) * height).sum() / 1e6), 1),
        "shorter_side_histogram": _histogram(shorter, doublings),
        "aspect_histogram": _histogram(aspect, np.array(_ASPECTS)),
    }


def sample_for_colours(selected: np.ndarray) -> np.ndarray:
    """The images whose colours are measured, (N,) bool: up to 1,000 of `selected` (N,) bool, evenly spread."""
    indices = np.flatnonzero(selected)
    sample = np.zeros_like(selected)
    sample[indices[np.linspace(0, len(indices) - 1, min(len(indices), _MAX_COLOUR_IMAGES)).astype(int)]] = True
    return sample


def mean_and_std(measurements: Measurements, selected: np.ndarray) -> dict[str, Any]:
    """Mean and standard deviation per channel, 0 to 1, over 64 × 64 pixels of each image of `selected` (N,) bool.

    All images have the same weight, whatever their size, as in training.
    """
    selected = selected & measurements.decoded
    if not selected.any():
        return {}
    means = measurements.means[selected].mean(axis=0, dtype=np.float64)
    squares = measurements.squares[selected].mean(axis=0, dtype=np.float64)
    deviations = np.sqrt(np.maximum(squares - means**2, 0))
    colours = {
        name: [round(float(value) / 255, 4) for value in values]
        for name, values in (("mean", means), ("std", deviations))
    }
    return {"num_images": int(selected.sum()), **colours}


def check_classes(listing: Listing) -> list[Finding]:
    """Findings about classes: empty, missing from a split, with similar names, or imbalanced.

    Splits without classes, such as unlabelled images to predict on, are ignored.
    """
    splits = {split: counts for split, counts in listing.classes.items() if counts}
    return [*_empty(splits), *_missing(splits), *_similar_names(splits), *_imbalanced(splits)]


def check_value_ranges(measurements: Measurements) -> list[Finding]:
    """A finding if the 16-bit images use so few of their values that most of the 256 grey levels are lost."""
    ranges = measurements.ranges[measurements.ranges[:, 0] <= measurements.ranges[:, 1]]
    if not len(ranges):
        return []
    low, high = int(ranges[:, 0].min()), int(ranges[:, 1].max())
    num_levels = high // 256 - low // 256 + 1
    if num_levels > _FEWEST_LEVELS:
        return []
    levels = "1 of 256 grey levels is" if num_levels == 1 else f"{num_levels} of 256 grey levels are"
    high = max(high, low + 1)
    detail = (
        f"{len(ranges):,} images of 16 bits use the values {low} to {high}: {levels} left; --input-range {low} {high}"
    )
    return [Finding("narrow_range", ".", detail)]


def _range(values: np.ndarray) -> dict[str, float]:
    return {
        name: round(float(function(values)), 3)
        for name, function in (("min", np.min), ("median", np.median), ("max", np.max))
    }


def _histogram(values: np.ndarray, edges: np.ndarray) -> list[tuple[float, int]]:
    counts, _ = np.histogram(values, edges)
    return [(round(float(edge), 3), int(count)) for edge, count in zip(edges, counts)]


def _empty(splits: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    return [
        Finding("empty_class", _path(split, name))
        for split, counts in splits.items()
        for name, count in counts.items()
        if count == 0
    ]


def _missing(splits: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    findings = []
    for name in sorted(set().union(*splits.values())):
        present = [split for split, counts in splits.items() if name in counts]
        missing = [split for split in splits if split not in present]
        if missing:
            findings.append(
                Finding("class_in_one_split", _path(present[0], name), f"missing from {', '.join(missing)}")
            )
    return findings


def _similar_names(splits: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    spellings: dict[str, dict[str, str]] = defaultdict(dict)
    for split, counts in splits.items():
        for name in counts:
            spellings[name.lower()].setdefault(name, _path(split, name))
    groups = [list(paths.values()) for paths in spellings.values() if len(paths) > 1]
    return [Finding("class_case", first, "", tuple(rest)) for first, *rest in groups]


def _imbalanced(splits: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    findings = []
    for split, counts in splits.items():
        filled = {name: count for name, count in counts.items() if count}
        if not filled:
            continue
        largest, smallest = max(filled, key=filled.__getitem__), min(filled, key=filled.__getitem__)
        if filled[largest] > LARGEST_IMBALANCE * filled[smallest]:
            detail = f"{filled[largest]:,} images of {largest}, {filled[smallest]:,} of {smallest}"
            findings.append(Finding("class_imbalance", split or ".", detail))
    return findings


def _path(split: str, name: str) -> str:
    return f"{split}/{name}" if split else name
