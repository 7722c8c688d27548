"""Figures over images, from what was kept of each: accuracies, F1 and calibration error in percent, and the loss."""

from collections.abc import Callable

import numpy as np

from linvit.training.metrics import ImageResults

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
