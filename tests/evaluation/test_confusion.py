"""The confusion matrix counts every image once, and is written and plotted with any class names."""

import csv
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch
from random_results import random_logits, recorded

from linvit.evaluation.confusion import OTHER, confusion, draw, most_confused, write_confusion

NAMES = list("abcdefg")


def counted(labels: list[int], predictions: list[int], label: int, prediction: int) -> int:
    return sum((own, found) == (label, prediction) for own, found in zip(labels, predictions))


def test_every_image_is_in_its_cell() -> None:
    results = recorded(*random_logits())
    labels, predictions = results.labels.tolist(), results.predictions.tolist()
    assert NAMES.index("g") in predictions
    found = confusion(results, NAMES)
    # The last class has no images, though it is predicted for some.
    assert found.names == NAMES[:-1]
    assert found.columns == [*NAMES[:-1], OTHER]
    expected = [[counted(labels, predictions, row, column) for column in range(7)] for row in range(6)]
    assert found.counts.tolist() == expected


def test_no_other_column_where_it_is_empty() -> None:
    results = recorded(torch.eye(3)[[0, 2, 2]], torch.tensor([0, 2, 0]))
    found = confusion(results, ["x", "y", "z"])
    assert (found.names, found.columns) == (["x", "z"], ["x", "z"])
    assert found.counts.tolist() == [[1, 1], [0, 1]]


def test_the_most_confused_come_first() -> None:
    results = recorded(torch.eye(3)[[1, 1, 0, 2, 2, 2, 0, 2]], torch.tensor([0, 0, 1, 2, 1, 1, 1, 1]))
    assert most_confused(results, ["x", "y", "z"], most=5) == [("y", "z", 3), ("x", "y", 2), ("y", "x", 2)]
    assert most_confused(results, ["x", "y", "z"], most=1) == [("y", "z", 3)]


def test_csv_and_png(tmp_path: Path) -> None:
    found = confusion(recorded(*random_logits()), NAMES)
    write_confusion(found, tmp_path / "matrix.csv")
    with (tmp_path / "matrix.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["label", *NAMES[:-1], OTHER]
    assert [row[0] for row in rows] == NAMES[:-1]
    assert np.array_equal(np.array([row[1:] for row in rows], int), found.counts)
    write_confusion(found, tmp_path / "matrix.png")
    image = cv2.imread(str(tmp_path / "matrix.png"))
    assert image is not None
    assert image.std() > 10


def test_any_class_name_is_drawn(tmp_path: Path) -> None:
    names = ["$x$", "a_b^c", "$\\frac{", "猫", "café", "n01440764"]
    found = confusion(recorded(*random_logits(num_classes=6)), names)
    figure = draw(found)
    (axes, _) = figure.axes
    # The fonts of matplotlib lack Chinese: the class is shown by its number.
    shown = ["$x$", "a_b^c", "$\\frac{", "#3", "café"]
    assert [label.get_text() for label in axes.get_yticklabels()] == shown
    assert [label.get_text() for label in axes.get_xticklabels()] == [*shown, OTHER]
    with warnings.catch_warnings():
        # A glyph that the font lacks is a warning.
        warnings.simplefilter("error")
        write_confusion(found, tmp_path / "matrix.png")
    plain = confusion(recorded(*random_logits(num_classes=6)), list("abcdef"))
    write_confusion(plain, tmp_path / "plain.png")
    one, other = (cv2.imread(str(tmp_path / name)) for name in ("matrix.png", "plain.png"))
    assert one is not None
    assert one.shape == other.shape
    assert not np.array_equal(one, other)
