"""The evaluation half of a page: scores, classes, confusions, calibration and the images with the highest loss."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

from linvit.evaluation.classes import short_names
from linvit.evaluation.metrics import ImageResults, Metrics
from linvit.evaluation.predictions import Predictions
from linvit.evaluation.scores import NUM_BINS, confidence_bins, confusion, most_confused, scorer
from linvit.evaluation.uncertainty import bootstrap, compare

NUM_RESAMPLES, SEED = 1000, 0
# Scores with their names; the first three are shown large.
SCORES = {
    "top1": "top-1",
    "top5": "top-5",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "ece": "calibration error (ECE)",
    "loss": "loss",
}
# The confusion matrix shows at most this many classes; those with the most errors, if there are more.
MOST_CELLS = 50
NUM_PAIRS = 20
# The 97.5th percentile of the normal distribution, for 95 % intervals.
_Z = 1.959963984540054


def wilson(hits: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in percent (Wilson 1927): within 0 to 100 also for few images."""
    if not count:
        return 0.0, 100.0
    share = hits / count
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def evaluate_predictions(found: Predictions, *, num_resamples: int = NUM_RESAMPLES, seed: int = SEED) -> dict[str, Any]:
    """Contents of the page about predictions, except images; see `templates/parts.html.j2`."""
    results, names = found.results, short_names(found.class_names)
    metrics = results.metrics(found.class_names)
    score = scorer(results, num_classes=len(names))
    exact = {"top1": metrics.top1, "top5": metrics.top5, "loss": metrics.loss}
    scores = {**score(np.ones(metrics.num_images)), **exact}
    intervals = _intervals(bootstrap(score, metrics.num_images, num_resamples=num_resamples, seed=seed), exact, metrics)
    rows = _class_rows(results, names)
    return {
        "num_images": metrics.num_images,
        "num_errors": int((~results.correct).sum()),
        "scores": [
            {"id": name, "name": text, "value": scores[name], "interval": intervals.get(name)}
            for name, text in SCORES.items()
            if name != "top5" or len(names) > 5
        ],
        "num_resamples": num_resamples,
        "classes": rows,
        "num_classes": len(rows),
        "pairs": _pairs(results, names),
        "confusion": _matrix(results, names),
        "bins": _bins(results),
        "ece": scores["ece"],
    }


def compare_predictions(found: Predictions, first: Predictions) -> dict[str, Any] | None:
    """Top-1 of predictions against others for the same images; None unless they are of the same images and classes."""
    if found.class_names != first.class_names or found.paths != first.paths:
        return None
    if found.results.labels.tolist() != first.results.labels.tolist():
        return None
    return compare(found.results, first.results, num_resamples=NUM_RESAMPLES, seed=SEED)


def worst_rows(results: ImageResults, *, most: int) -> list[int]:
    """Positions of the images with the highest loss, the worst first."""
    order: list[int] = results.losses.argsort(descending=True, stable=True)[:most].tolist()
    return order


def _intervals(
    drawn: dict[str, tuple[float, float]], scores: dict[str, float], metrics: Metrics
) -> dict[str, tuple[float, float]]:
    """The intervals of the bootstrap. It gives none where all images agree, and shares then have Wilson's."""
    intervals = {name: bounds for name, bounds in drawn.items() if bounds[0] < bounds[1]}
    for name in ("top1", "top5"):
        if name in drawn and name not in intervals:
            intervals[name] = wilson(scores[name] * metrics.num_images / 100, metrics.num_images)
    return intervals


def _class_rows(results: ImageResults, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row per class with images, those with the most errors first."""
    labels, predictions = results.labels.numpy(), results.predictions.numpy()
    hits = labels[labels == predictions]
    images, predicted, right = (np.bincount(each, minlength=len(names)) for each in (labels, predictions, hits))
    most_taken_for = {label: (other, count) for label, other, count in _pair_counts(results, names)[::-1]}
    rows = []
    for label in np.flatnonzero(images).tolist():
        other, count = most_taken_for.get(label, (None, 0))
        rows.append(
            {
                "name": names[label],
                "images": int(images[label]),
                "accuracy": 100 * float(right[label] / images[label]),
                "interval": wilson(float(right[label]), float(images[label])),
                "precision": 100 * float(right[label] / predicted[label]) if predicted[label] else None,
                "f1": 200 * float(right[label] / (images[label] + predicted[label])),
                "errors": int(images[label] - right[label]),
                "taken_for": None if other is None else names[other],
                "taken_count": count,
            }
        )
    return sorted(rows, key=lambda row: (-row["errors"], row["name"]))


def _pair_counts(results: ImageResults, names: Sequence[str]) -> list[tuple[int, int, int]]:
    """Label, prediction and number of images of each kind of error, the most frequent first."""
    indices = [str(number) for number in range(len(names))]
    return [(int(a), int(b), count) for a, b, count in most_confused(results, indices, most=len(results.labels))]


def _pairs(results: ImageResults, names: Sequence[str]) -> list[dict[str, Any]]:
    images = np.bincount(results.labels.numpy(), minlength=len(names))
    return [
        {"label": names[a], "prediction": names[b], "images": count, "share": 100 * count / int(images[a])}
        for a, b, count in _pair_counts(results, names)[:NUM_PAIRS]
    ]


def _matrix(results: ImageResults, names: Sequence[str]) -> dict[str, Any]:
    """The confusion matrix for confusion.js, with three orders of the classes."""
    matrix = confusion(results, names)
    counts, columns = matrix.counts, list(matrix.columns)
    num_rows = len(matrix.names)
    errors = counts.sum(1) - np.diag(counts)
    kept = np.sort(np.argsort(-(errors + counts[:, :num_rows].sum(0) - np.diag(counts)), kind="stable")[:MOST_CELLS])
    totals = counts.sum(1)[kept]
    if len(kept) < num_rows:
        shown = counts[np.ix_(kept, kept)]
        rest = totals - shown.sum(1)
        counts = np.concatenate([shown, rest[:, None]], axis=1)
        columns = [matrix.names[row] for row in kept] + ["classes not shown"]
    shares = np.diag(counts) / totals
    return {
        "names": [matrix.names[row] for row in kept],
        "columns": columns,
        "counts": counts.tolist(),
        "totals": totals.tolist(),
        "num_classes": num_rows,
        "orders": {
            "as in the data": list(range(len(kept))),
            "most errors first": np.argsort(shares, kind="stable").tolist(),
            "confused classes together": _clustered(counts[:, : len(kept)], totals),
        },
    }


def _clustered(counts: np.ndarray, totals: np.ndarray) -> list[int]:
    """An order in which classes that are often confused are neighbours, by average linkage."""
    if len(counts) < 3:
        return list(range(len(counts)))
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    shares = counts / totals[:, None]
    distances = 1 - (shares + shares.T) / 2
    np.fill_diagonal(distances, 0)
    order: list[int] = leaves_list(
        linkage(squareform(distances, checks=False), "average", optimal_ordering=True)
    ).tolist()
    return order


def _bins(results: ImageResults) -> list[dict[str, Any]]:
    """The bins of the reliability diagram that contain images: mean confidence and accuracy, in percent."""
    confidence, correct = results.probabilities.numpy(), results.correct.numpy()
    bins = confidence_bins(confidence)
    found = []
    for number in range(NUM_BINS):
        inside = bins == number
        if inside.any():
            found.append(
                {
                    "low": 100 * number / NUM_BINS,
                    "high": 100 * (number + 1) / NUM_BINS,
                    "images": int(inside.sum()),
                    "share": float(inside.mean()),
                    "confidence": 100 * float(confidence[inside].mean()),
                    "accuracy": 100 * float(correct[inside].mean()),
                }
            )
    return found
