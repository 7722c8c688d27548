"""Temperature scaling (Guo et al. 2017): logits divided by one number, fitted on images that do not judge it."""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from linvit.evaluation.scores import scorer
from linvit.training.metrics import ImageResults

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
