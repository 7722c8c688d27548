"""Scores equal their definitions and scikit-learn's; temperatures have the highest likelihood."""

import csv
import math
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import sklearn.metrics
import torch
from random_results import random_logits, recorded
from torch import Tensor
from torch.nn import functional as F

from linvit.evaluation.metrics import ImageResults
from linvit.evaluation.scores import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    OTHER,
    calibration,
    confidence_bins,
    confusion,
    draw,
    fit_temperature,
    most_confused,
    random_halves,
    scorer,
    write_confusion,
)


def by_definition(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The definitions, one image and one class at a time, in float64."""
    probabilities = logits.double().softmax(1)
    rows = [(row.tolist(), int(label)) for row, label in zip(probabilities, labels)]
    predictions = [max(range(len(row)), key=row.__getitem__) for row, _ in rows]
    num_images = len(rows)
    recalls, f1s = [], []
    for name in sorted(set(labels.tolist())):
        own = [prediction for prediction, (_, label) in zip(predictions, rows) if label == name]
        hits = own.count(name)
        recall, predicted = hits / len(own), predictions.count(name)
        precision = hits / predicted if predicted else 0.0
        recalls.append(recall)
        f1s.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    ece = 0.0
    for number in range(15):
        inside = [
            (max(row), prediction == label)
            for prediction, (row, label) in zip(predictions, rows)
            if number / 15 < max(row) <= (number + 1) / 15
        ]
        if inside:
            confidence = sum(value for value, _ in inside) / len(inside)
            accuracy = sum(hit for _, hit in inside) / len(inside)
            ece += len(inside) / num_images * abs(confidence - accuracy)
    in_top5 = [sum(value > row[label] for value in row) < 5 for row, label in rows]
    return {
        "top1": 100 * sum(p == label for p, (_, label) in zip(predictions, rows)) / num_images,
        "top5": 100 * sum(in_top5) / num_images,
        "loss": math.fsum(-math.log(row[label]) for row, label in rows) / num_images,
        "balanced_accuracy": 100 * sum(recalls) / len(recalls),
        "macro_f1": 100 * sum(f1s) / len(f1s),
        "ece": 100 * ece,
    }


@pytest.mark.parametrize("num_images", [1, 13, 60])
def test_scores_equal_the_definitions(num_images: int) -> None:
    logits, labels = random_logits(num_images)
    found = scorer(recorded(logits, labels), num_classes=7)(np.ones(num_images))
    assert found == pytest.approx(by_definition(logits, labels), rel=1e-6)


def test_an_image_that_counts_twice_is_two_images() -> None:
    logits, labels = random_logits()
    counts = np.random.default_rng(0).integers(0, 4, len(labels))
    rows = torch.from_numpy(np.repeat(np.arange(len(labels)), counts))
    found = scorer(recorded(logits, labels), num_classes=7)(counts)
    assert found == pytest.approx(by_definition(logits[rows], labels[rows]), rel=1e-6)


def random_case(num_images: int, num_classes: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (num_images,), generator=generator)
    return 3 * torch.randn(num_images, num_classes, generator=generator), labels


def tied_case() -> tuple[Tensor, Tensor]:
    """Logits of few values, so that classes tie everywhere: for the first place, and for the fifth."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 3, (400, 9), generator=generator).float(), torch.randint(0, 9, (400,), generator=generator)


CASES = {
    "random": random_case(500, 11),
    "many classes, few images": random_case(40, 100, seed=1),
    "a class without images": random_logits(),
    "images of one class": (random_case(50, 8, seed=2)[0], torch.full((50,), 3)),
    "images of one class, all wrong": (torch.arange(7.0).repeat(6, 1), torch.full((6,), 5)),
    "one image": random_case(1, 6),
    "two classes": random_case(30, 2),
    "all correct": (10 * torch.eye(6), torch.arange(6)),
    "ties": tied_case(),
    "all classes tie": (torch.zeros(20, 7), torch.arange(20) % 7),
}


def exact_results(logits: Tensor, labels: Tensor) -> ImageResults:
    """The recorded results, with losses and probabilities in float64."""
    results = recorded(logits, labels)
    log_probabilities = logits.double().log_softmax(1)
    results.losses.copy_(-log_probabilities.gather(1, labels[:, None]).squeeze(1))
    results.probabilities.copy_(log_probabilities.amax(1).exp())
    return results


@pytest.mark.filterwarnings("ignore:.*y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("name", CASES)
def test_scores_equal_those_of_scikit_learn(name: str) -> None:
    logits, labels = CASES[name]
    num_images, num_classes = logits.shape
    results = exact_results(logits, labels)
    scores = scorer(results, num_classes=num_classes)(np.ones(num_images))
    metrics = results.metrics([f"class {label}" for label in range(num_classes)])
    true, predicted = labels.numpy(), results.predictions.numpy()
    present, classes = np.unique(true), np.arange(num_classes)
    probabilities = logits.double().softmax(1).numpy()
    # With ties, any of the most probable classes may be the prediction.
    assert (probabilities[np.arange(num_images), predicted] == probabilities.max(1)).all()

    accuracy = 100 * sklearn.metrics.accuracy_score(true, predicted)
    assert (scores["top1"], metrics.top1) == pytest.approx((accuracy, accuracy), rel=1e-12)
    balanced = 100 * sklearn.metrics.balanced_accuracy_score(true, predicted)
    assert scores["balanced_accuracy"] == pytest.approx(balanced, rel=1e-12)
    # scikit-learn also counts predicted classes without images, with an F1 of 0, unless the classes are given.
    f1 = 100 * sklearn.metrics.f1_score(true, predicted, labels=present, average="macro", zero_division=0)
    assert scores["macro_f1"] == pytest.approx(f1, rel=1e-12)
    loss = sklearn.metrics.log_loss(true, probabilities, labels=classes)
    assert (scores["loss"], metrics.loss) == pytest.approx((loss, loss), rel=1e-12)
    # What is recorded has the precision of float32.
    assert recorded(logits, labels).metrics([""] * num_classes).loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
    recalls = 100 * sklearn.metrics.recall_score(true, predicted, labels=present, average=None)
    assert [metrics.per_class[f"class {label}"] for label in present] == pytest.approx(list(recalls), rel=1e-12)

    matrix = sklearn.metrics.confusion_matrix(true, predicted, labels=classes)
    counts = confusion(results, [f"class {label}" for label in range(num_classes)])
    size = len(present)
    assert np.array_equal(counts.counts[:, :size], matrix[np.ix_(present, present)])
    elsewhere = np.delete(matrix[present], present, axis=1).sum(1)
    assert np.array_equal(counts.counts[:, size] if OTHER in counts.columns else np.zeros(size, int), elsewhere)


def sklearn_top5(logits: Tensor, labels: Tensor) -> float:
    classes = np.arange(logits.shape[1])
    # scikit-learn refuses two columns of scores: it takes two classes as one column.
    if len(classes) < 5:
        return 100.0
    return 100 * sklearn.metrics.top_k_accuracy_score(labels.numpy(), logits.double().numpy(), k=5, labels=classes)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("name", CASES)
def test_top5_equals_that_of_scikit_learn(name: str) -> None:
    logits, labels = CASES[name]
    results = exact_results(logits, labels)
    top5 = scorer(results, num_classes=logits.shape[1])(np.ones(len(labels)))["top5"]
    own = logits.gather(1, labels[:, None])
    # Where the label ties with the fifth class, both answers are right; elsewhere there is one.
    better, at_least = (logits > own).sum(1), (logits >= own).sum(1)
    is_tied = (better < 5) & (at_least > 5)
    assert torch.equal(results.in_top5[~is_tied], (better < 5)[~is_tied])
    for_sure, at_best = (100 * float(hits.double().mean()) for hits in (at_least <= 5, better < 5))
    assert for_sure <= top5 <= at_best
    assert is_tied.any() == ("tie" in name)
    if not is_tied.all():
        kept = ~is_tied
        kept_top5 = 100 * float(results.in_top5[kept].double().mean())
        assert kept_top5 == pytest.approx(sklearn_top5(logits[kept], labels[kept]), rel=1e-12)
    if not is_tied.any():
        assert top5 == pytest.approx(sklearn_top5(logits, labels), rel=1e-12)


def test_bins_include_their_upper_end() -> None:
    assert confidence_bins(np.array([0.0, 1e-9, 1 / 15, 1 / 15 + 1e-6, 0.5, 1.0])).tolist() == [0, 0, 0, 1, 7, 14]


def test_the_temperature_has_the_highest_likelihood() -> None:
    logits, labels = random_logits(500)
    temperature = fit_temperature(logits, labels)
    losses = [F.cross_entropy(logits.double() / (temperature * factor), labels).item() for factor in (0.99, 1, 1.01)]
    assert min(losses) == losses[1]
    # Logits that are twice as large need twice the temperature.
    assert fit_temperature(2 * logits, labels) == pytest.approx(2 * temperature, rel=1e-9)


def test_a_calibrated_model_has_temperature_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    found = calibration(recorded(4 * logits, labels), 4 * logits, fit_temperature(4 * logits, labels))
    assert found["temperature"] == pytest.approx(4, abs=0.1)
    assert found["ece_before"] > 15
    assert found["ece"] < 1.5
    assert found["loss"] < found["loss_before"]


@pytest.mark.parametrize(("sign", "limit"), [(1, MIN_TEMPERATURE), (-1, MAX_TEMPERATURE)])
def test_the_temperature_is_limited_if_all_images_are_right_or_wrong(sign: int, limit: float) -> None:
    logits, labels = sign * torch.eye(4), torch.arange(4)
    assert fit_temperature(logits, labels) == pytest.approx(limit, rel=1e-6)


def test_temperature_one_changes_nothing() -> None:
    logits, labels = random_logits()
    found = calibration(recorded(logits, labels), logits, 1.0)
    assert (found["loss"], found["ece"]) == pytest.approx((found["loss_before"], found["ece_before"]), rel=1e-6)


def test_halves_share_no_image() -> None:
    one, other = random_halves(11, seed=0)
    assert (len(one), len(other)) == (5, 6)
    assert sorted([*one.tolist(), *other.tolist()]) == list(range(11))
    assert torch.equal(random_halves(11, seed=0)[0], one)
    assert not torch.equal(random_halves(11, seed=1)[0], one)


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
