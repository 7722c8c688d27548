import math

import numpy as np
import pytest
import torch
from random_results import random_logits, recorded

from linvit.evaluation.scores import bin_of, scorer


def expected(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
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
def test_scores_are_those_of_the_definitions(num_images: int) -> None:
    logits, labels = random_logits(num_images)
    found = scorer(recorded(logits, labels), num_classes=7)(np.ones(num_images))
    assert found == pytest.approx(expected(logits, labels), rel=1e-6)


def test_an_image_that_counts_twice_is_two_images() -> None:
    logits, labels = random_logits()
    counts = np.random.default_rng(0).integers(0, 4, len(labels))
    rows = torch.from_numpy(np.repeat(np.arange(len(labels)), counts))
    found = scorer(recorded(logits, labels), num_classes=7)(counts)
    assert found == pytest.approx(expected(logits[rows], labels[rows]), rel=1e-6)


def test_bins_hold_their_upper_end() -> None:
    assert bin_of(np.array([0.0, 1e-9, 1 / 15, 1 / 15 + 1e-6, 0.5, 1.0])).tolist() == [0, 0, 0, 1, 7, 14]
