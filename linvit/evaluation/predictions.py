"""predictions.csv: what a model predicted for each image of a data set, so that it can be looked at without the data.

Columns: path relative to the data, label, prediction, probability of the prediction, loss in nats, whether the
prediction is correct, whether the label is among the five most probable classes.
"""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from linvit.data.sources.base import ImageSet
from linvit.evaluation.metrics import ImageResults
from linvit.output.cells import CsvWriter, Utf8, text_of_cell
from linvit.output.files import write_file

_COLUMNS = ("path", "label", "prediction", "probability", "loss", "correct", "in_top5")


@dataclass(frozen=True)
class Predictions:
    """The predictions for N images.

    Attributes:
        results: what was predicted; `labels` and `predictions` index `class_names`.
        class_names: names of the model's classes.
        paths: what identifies each image wherever the data are, (N,); see `ImageSet.relative_names`.
    """

    results: ImageResults
    class_names: list[str]
    paths: list[str]


def predictions_of(results: ImageResults, images: ImageSet) -> Predictions:
    """The predictions for the images of a set."""
    names = list(images.relative_names())
    paths = [os.fsdecode(names[index]) for index in results.indices.tolist()]
    return Predictions(results, images.class_names, paths)


def write_predictions(path: Path, results: ImageResults, images: ImageSet) -> None:
    """Write the predictions for the images of a set. Raises OSError, naming the file, on failure."""
    found = predictions_of(results, images)
    columns = (results.labels, results.predictions, results.probabilities, results.losses, results.in_top5)

    def write(writer: CsvWriter) -> None:
        writer.writerow(_COLUMNS)
        for name, label, prediction, probability, loss, in_top5 in zip(found.paths, *(c.tolist() for c in columns)):
            names = found.class_names[label], found.class_names[prediction]
            # Nine digits identify a float32.
            row = [name, *names, f"{probability:.9g}", f"{loss:.9g}", int(label == prediction), int(in_top5)]
            writer.writerow(row)

    write_file(path, lambda file: write(CsvWriter(Utf8(file))))


def read_predictions(path: Path, class_names: Sequence[str]) -> Predictions:
    """The predictions in a file, of a model with these classes.

    Raises ValueError, naming the file, if it is damaged or of other classes.
    """
    label_of = {name: label for label, name in enumerate(class_names)}
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            rows = [{name: text_of_cell(cell) for name, cell in row.items()} for row in reader]
        labels = torch.tensor([[label_of[row["label"]], label_of[row["prediction"]]] for row in rows])
        numbers = torch.tensor([[float(row[name]) for name in ("probability", "loss", "in_top5")] for row in rows])
        paths = [row["path"] for row in rows]
    except (OSError, UnicodeError, csv.Error, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: is damaged or of other classes: restore or delete it") from error
    if not rows:
        raise ValueError(f"{path}: contains no predictions")
    results = ImageResults(
        indices=torch.arange(len(rows)),
        labels=labels[:, 0],
        losses=numbers[:, 1].double(),
        predictions=labels[:, 1],
        probabilities=numbers[:, 0].double(),
        in_top5=numbers[:, 2].bool(),
    )
    return Predictions(results, list(class_names), paths)
