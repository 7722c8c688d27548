"""Figures over images, from what was kept of each: accuracies, F1 and calibration error in percent, and the loss.

Temperature scaling (Guo et al. 2017): logits divided by one number, fitted on images that do not judge it.

ReaL labels: ImageNet's validation images with every label that is right (Beyer et al. 2020, "Are we done ...?").
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linvit.data.sources.base import ImageSet
from linvit.evaluation.classes import real_labels, synsets
from linvit.evaluation.metrics import ImageResults
from linvit.evaluation.uncertainty import bootstrap

NUM_BINS = 15


def scorer(results: ImageResults, *, num_classes: int) -> Callable[[np.ndarray], dict[str, float]]:
    """A function from how often each image counts, (N,), to the figures.

    top1, top5: share of images whose label is the most probable class, or among the five most probable.
    loss: mean negative log-likelihood, in nats.
    balanced_accuracy: mean over classes of the share of their images that are right.
    macro_f1: mean over classes of 2 TP / (2 TP + FP + FN).
    ece: expected calibration error over 15 bins of equal width (Guo et al. 2017): the mean gap between confidence and
        accuracy.

    The means over classes are over those that have images.
    """
    labels, predictions = results.labels.numpy(), results.predictions.numpy()
    correct, in_top5 = results.correct.numpy().astype(float), results.in_top5.numpy().astype(float)
    losses, confidence = results.losses.numpy(), results.probabilities.numpy()
    bins = bin_of(confidence)

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


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """The bin of each probability in 0..1: bin m holds those in (m / 15, (m + 1) / 15]."""
    bins: np.ndarray = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    return bins


# Where all predictions are right, the likelihood only grows as the temperature falls.
LOWEST, HIGHEST = 0.01, 100.0
_STEPS = 60


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the highest likelihood of `labels` (N,) under `logits` (N, C) divided by it.

    It lies between 0.01 and 100. The likelihood is concave in its inverse, so that bisection finds it.
    """
    logits = logits.double()
    own = logits.gather(1, labels[:, None]).squeeze(1)
    low, high = math.log(1 / HIGHEST), math.log(1 / LOWEST)
    for _ in range(_STEPS):
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


def halves(num_images: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Two random halves of 0 .. N - 1, each ascending; the second has one more where N is odd."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(num_images))
    return order[: num_images // 2].sort().values, order[num_images // 2 :].sort().values


_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\b")


def image_numbers(images: ImageSet) -> list[int]:
    """The number of each image among ImageNet's validation images; ValueError for an image that is none of them."""
    numbers = []
    for index in range(len(images)):
        name = images.path(index).name
        found = _NUMBER.match(name)
        if found is None or not 1 <= int(found[1]) <= len(real_labels()):
            raise ValueError(
                f"--real-labels: {images.path(index)} is no image of ImageNet's validation set, which are named "
                "ILSVRC2012_val_00000001.JPEG and so on"
            )
        numbers.append(int(found[1]))
    return numbers


def real_accuracy(
    results: ImageResults, numbers: list[int], class_names: list[str], *, num_resamples: int, seed: int
) -> dict[str, Any]:
    """The share of images whose most probable class is among the right ones, in percent; images without any are out."""
    allowed = [{synsets()[label] for label in real_labels()[numbers[i] - 1]} for i in results.indices.tolist()]
    hits = np.array(
        [class_names[label] in names for label, names in zip(results.predictions.tolist(), allowed) if names], float
    )
    if not len(hits):
        raise ValueError("--real-labels: none of these images has a ReaL label")

    def share(counts: np.ndarray) -> dict[str, float]:
        return {"top1": 100 * float(counts @ hits / counts.sum())}

    intervals = bootstrap(share, len(hits), num_resamples=num_resamples, seed=seed)
    return {**share(np.ones(len(hits))), "num_images": len(hits), "confidence": intervals}
