"""The confusion matrix as CSV or PNG, and its largest entries."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from linvit.evaluation.classes import with_lemma
from linvit.evaluation.metrics import ImageResults
from linvit.output.files import write_text
from linvit.output.plots import drawable, save_figure

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
    writer = csv.writer(text, lineterminator="\n")
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
