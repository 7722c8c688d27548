"""Which classes are taken for which: the matrix as CSV or PNG, and its largest entries."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from linvit.evaluation.classes import describe
from linvit.evaluation.metrics import ImageResults
from linvit.output.files import write_file, write_text

OTHER = "any other class"
MOST_CLASSES = 5000
# Beyond these the picture has no room for numbers, and for names.
MOST_NUMBERS, MOST_NAMES = 20, 60


@dataclass(frozen=True)
class Confusion:
    """A row per class that has images, a column per class that they are taken for: counts (R, C).

    The columns are the rows' classes, in the same order, and OTHER where images were taken for a class without any.
    """

    names: list[str]
    columns: list[str]
    counts: np.ndarray


def confusion(results: ImageResults, class_names: Sequence[str]) -> Confusion:
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
    """Class, the class that it was taken for, and how often, the most frequent first."""
    wrong = ~results.correct.numpy()
    pairs = results.labels.numpy()[wrong] * len(class_names) + results.predictions.numpy()[wrong]
    codes, counts = np.unique(pairs, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [
        (class_names[code // len(class_names)], class_names[code % len(class_names)], int(count))
        for code, count in zip(codes[order], counts[order])
    ]


def write_confusion(found: Confusion, path: Path) -> None:
    """Write counts as CSV, or draw them, as the file's ending says."""
    if path.suffix == ".png":
        figure = draw(found)
        write_file(path, lambda file: figure.savefig(file, format="png", dpi=150))
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", *found.columns])
    writer.writerows([name, *row] for name, row in zip(found.names, found.counts.tolist()))
    write_text(path, text.getvalue())


def draw(found: Confusion) -> Figure:
    """The share of each class's images that were taken for each class, dark where it is high."""
    shares = found.counts / found.counts.sum(1, keepdims=True)
    num_rows = len(found.names)
    side = 4.5 + 0.3 * min(num_rows, MOST_NAMES)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="label")
    if num_rows <= MOST_NAMES:
        axes.set_xticks(range(len(found.columns)), [describe(name) for name in found.columns], rotation=90)
        axes.set_yticks(range(num_rows), [describe(name) for name in found.names])
    if num_rows <= MOST_NUMBERS:
        for row, column in zip(*found.counts.nonzero()):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = str(found.counts[row, column])
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("share of the label's images")
    return figure
