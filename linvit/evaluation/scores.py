"""Scores from the results of each image: accuracies, F1, calibration error, confusion.

Temperature scaling divides the logits by one number, fitted on other images than it is evaluated on (Guo et al. 2017).
ReaL labels are all correct labels of ImageNet's validation images (Beyer et al. 2020, "Are we done with ImageNet?").
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from linvit.data.sources.base import ImageSet
from linvit.evaluation.classes import real_labels, synsets, with_lemma
from linvit.evaluation.metrics import ImageResults
from linvit.evaluation.uncertainty import bootstrap
from linvit.output.cells import CsvWriter
from linvit.output.files import write_text
from linvit.output.plots import drawable, save_figure

NUM_BINS = 15
# If all predictions are correct, the likelihood grows without limit as the temperature falls.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
_BISECTION_STEPS = 60
_IMAGE_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\b")


def scorer(results: ImageResults, *, num_classes: int) -> Callable[[np.ndarray], dict[str, float]]:
    """A function from the number of times each image counts, (N,), to scores; all but the loss in percent.

    top1, top5: fraction of images whose label is the most probable class, or among the five most probable.
    loss: mean negative log-likelihood, in nats.
    balanced_accuracy: mean recall over classes.
    macro_f1: mean over classes of 2 TP / (2 TP + FP + FN).
    ece: expected calibration error over 15 bins of equal width (Guo et al. 2017): the mean gap between confidence and
        accuracy.

    Means over classes include only classes with images.
    """
    labels, predictions = results.labels.numpy(), results.predictions.numpy()
    correct, in_top5 = results.correct.numpy().astype(float), results.in_top5.numpy().astype(float)
    losses, confidence = results.losses.numpy(), results.probabilities.numpy()
    bins = confidence_bins(confidence)

    def score(counts: np.ndarray) -> dict[str, float]:
        weights = counts.astype(float)
        hits = weights * correct
        total = weights.sum()
        support = np.bincount(labels, weights, num_classes)
        predicted = np.bincount(predictions, weights, num_classes)
        true_positives = np.bincount(labels, hits, num_classes)
        seen = support > 0
        f1 = 2 * true_positives[seen] / (support[seen] + predicted[seen])
        gaps = np.bincount(bins, weights * confidence, NUM_BINS) - np.bincount(bins, hits, NUM_BINS)
        return {
            "top1": 100 * float(hits.sum() / total),
            "top5": 100 * float(weights @ in_top5 / total),
            "loss": float(weights @ losses / total),
            "balanced_accuracy": 100 * float((true_positives[seen] / support[seen]).mean()),
            "macro_f1": 100 * float(f1.mean()),
            "ece": 100 * float(np.abs(gaps).sum() / total),
        }

    return score


def confidence_bins(confidence: np.ndarray) -> np.ndarray:
    """The bin of each probability: bin m holds those in (m / 15, (m + 1) / 15], and bin 0 also holds 0."""
    bins: np.ndarray = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    return bins


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the highest likelihood of `labels` (N,) under `logits` (N, C) divided by it.

    It lies between 0.01 and 100. The log-likelihood is concave in the inverse temperature, so bisection finds it.
    """
    logits = logits.double()
    own = logits.gather(1, labels[:, None]).squeeze(1)
    low, high = math.log(1 / MAX_TEMPERATURE), math.log(1 / MIN_TEMPERATURE)
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        expected = ((math.exp(middle) * logits).softmax(1) * logits).sum(1)
        if (expected - own).mean() <= 0:
            low = middle
        else:
            high = middle
    return math.exp(-(low + high) / 2)


def calibration(results: ImageResults, logits: Tensor, temperature: float) -> dict[str, float]:
    """Loss and calibration error of these images before and after their logits (N, C) are divided by a temperature."""
    log_probabilities = (logits.double() / temperature).log_softmax(1)
    after = replace(
        results,
        losses=-log_probabilities.gather(1, results.labels[:, None]).squeeze(1),
        probabilities=log_probabilities.gather(1, results.predictions[:, None]).squeeze(1).exp(),
    )
    ones = np.ones(len(results.labels))
    before_scores, after_scores = (scorer(each, num_classes=logits.shape[1])(ones) for each in (results, after))
    return {
        "temperature": temperature,
        "loss_before": before_scores["loss"],
        "loss": after_scores["loss"],
        "ece_before": before_scores["ece"],
        "ece": after_scores["ece"],
        "num_images": len(results.labels),
    }


def random_halves(num_images: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Two random halves of 0 .. N - 1, each in ascending order; if N is odd, the second is larger."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(num_images))
    return order[: num_images // 2].sort().values, order[num_images // 2 :].sort().values


def imagenet_numbers(images: ImageSet) -> list[int]:
    """The number of each image in ImageNet's validation set; ValueError for a file name that has none."""
    numbers = []
    for index in range(len(images)):
        name = images.path(index).name
        match = _IMAGE_NUMBER.match(name)
        if match is None or not 1 <= int(match[1]) <= len(real_labels()):
            raise ValueError(
                f"--real-labels: {images.path(index)} is not an image of ImageNet's validation set; name its images "
                "as in the original, ILSVRC2012_val_00000001.JPEG and so on"
            )
        numbers.append(int(match[1]))
    return numbers


def real_accuracy(
    results: ImageResults, numbers: list[int], class_names: list[str], *, num_resamples: int, seed: int
) -> dict[str, Any]:
    """ReaL accuracy: the percentage of images whose most probable class is a ReaL label, with its interval.

    Images without ReaL labels are excluded. Raises ValueError if none has one.
    """
    allowed = [{synsets()[label] for label in real_labels()[numbers[i] - 1]} for i in results.indices.tolist()]
    hits = np.array(
        [class_names[label] in names for label, names in zip(results.predictions.tolist(), allowed) if names], float
    )
    if not len(hits):
        raise ValueError("--real-labels: none of these images has a ReaL label; evaluate more images")

    def accuracy(counts: np.ndarray) -> dict[str, float]:
        return {"top1": 100 * float(counts @ hits / counts.sum())}

    intervals = bootstrap(accuracy, len(hits), num_resamples=num_resamples, seed=seed)
    return {**accuracy(np.ones(len(hits))), "num_images": len(hits), "confidence": intervals}


OTHER = "any other class"
MOST_CLASSES = 5000
# A plot with more classes has no room for the counts, or for the names.
MOST_COUNTS, MOST_NAMES = 20, 60


@dataclass(frozen=True)
class Confusion:
    """Counts (R, C): a row per class with images, a column per predicted class.

    The columns are the classes of the rows in the same order, then OTHER if a class without images was predicted.
    """

    names: list[str]
    columns: list[str]
    counts: np.ndarray


def confusion(results: ImageResults, class_names: Sequence[str]) -> Confusion:
    """The confusion matrix of all images."""
    labels, predictions = results.labels.numpy(), results.predictions.numpy()
    present = np.unique(labels)
    column_of = np.full(len(class_names), len(present))
    column_of[present] = np.arange(len(present))
    cells = np.searchsorted(present, labels) * (len(present) + 1) + column_of[predictions]
    shape = len(present), len(present) + 1
    counts = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
    names = [class_names[label] for label in present]
    if not counts[:, -1].any():
        return Confusion(names, names, counts[:, :-1])
    return Confusion(names, [*names, OTHER], counts)


def most_confused(results: ImageResults, class_names: Sequence[str], *, most: int) -> list[tuple[str, str, int]]:
    """The `most` most frequent errors: label, prediction and number of images, most frequent first."""
    wrong = ~results.correct.numpy()
    pairs = results.labels.numpy()[wrong] * len(class_names) + results.predictions.numpy()[wrong]
    codes, counts = np.unique(pairs, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [
        (class_names[code // len(class_names)], class_names[code % len(class_names)], int(count))
        for code, count in zip(codes[order], counts[order])
    ]


def write_confusion(matrix: Confusion, path: Path) -> None:
    """Write the counts as CSV, or plot them as PNG, by the file's extension."""
    if path.suffix == ".png":
        save_figure(path, draw(matrix))
        return
    text = io.StringIO()
    writer = CsvWriter(text)
    writer.writerow(["label", *matrix.columns])
    writer.writerows([name, *row] for name, row in zip(matrix.names, matrix.counts.tolist()))
    write_text(path, text.getvalue())


def draw(matrix: Confusion) -> Figure:
    """A plot of each row's shares, dark where they are high."""
    shares = matrix.counts / matrix.counts.sum(1, keepdims=True)
    num_rows = len(matrix.names)
    side = 4.5 + 0.3 * min(num_rows, MOST_NAMES)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="label")
    if num_rows <= MOST_NAMES:
        # The columns begin with the names of the rows.
        names = drawable([with_lemma(name) for name in matrix.columns])
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(num_rows), names[:num_rows])
    if num_rows <= MOST_COUNTS:
        for row, column in zip(*matrix.counts.nonzero()):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = str(matrix.counts[row, column])
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("share of the label's images")
    return figure
