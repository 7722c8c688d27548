"""Sets of classes that contain the true one with a chosen probability, by split conformal prediction.

A score measures how unlikely a class is for an image. The threshold is a quantile of the true classes' scores on n
calibration images, the ⌈(n + 1)(1 - α)⌉-th smallest; the set of an image holds all classes up to it. For images drawn
as the calibration images were, sets contain the true class with a probability of at least 1 - α, on average over
classes and images, whatever the model.

    lac    1 - p(class): the smallest sets on average (Sadinle et al. 2019, arXiv 1609.00451); a set may be empty
    raps   the probability of the class and of all more probable ones, and a penalty on ranks beyond 5 (Angelopoulos et
           al. 2021, arXiv 2009.14193); without their randomisation, so that sets are the same every time and coverage
           errs upwards

N images, C classes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from linvit.model.description import read_json
from linvit.output.terminal import printable

Method = Literal["lac", "raps"]
# The penalty per rank beyond the first ranks, as in the paper's experiments on ImageNet.
_PENALTY, _FREE_RANKS = 0.01, 5


class ConformalRule(BaseModel):
    """Turns an image's probabilities into a set of classes; calibrated on `num_calibration` images for `alpha`.

    `fingerprint` identifies the model: that of `linvit.evaluation.inference.fingerprint`, or None if it is unknown.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    method: Method
    alpha: Annotated[float, Field(gt=0, lt=1)]
    threshold: float
    num_calibration: int
    class_names: list[str]
    fingerprint: str | None = None

    def sets(self, probabilities: Tensor) -> Tensor:
        """Whether each class belongs to the set of each image: (N, C) for probabilities (N, C)."""
        sets = scores(probabilities, self.method) <= self.threshold
        if self.method == "raps":
            # An adaptive score includes the class's own probability, so the surest images could get no class at all.
            sets.scatter_(1, probabilities.argmax(1, keepdim=True), True)
        return sets


def scores(probabilities: Tensor, method: Method) -> Tensor:
    """Scores of each class for each image, (N, C) in float64; higher is less likely."""
    probabilities = probabilities.double()
    if method == "lac":
        return 1 - probabilities
    ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
    ranks = torch.arange(1, probabilities.shape[1] + 1, device=probabilities.device, dtype=torch.float64)
    sums = ordered.cumsum(1)
    # The last sum is exactly one: rounding would decide whether a set with a threshold of one is complete.
    sums = sums / sums[:, -1:]
    penalised = sums + _PENALTY * (ranks - _FREE_RANKS).clamp_min(0)
    return torch.empty_like(penalised).scatter_(1, order, penalised)


def calibrate(
    probabilities: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    method: Method,
    class_names: Sequence[str],
    fingerprint: str | None = None,
) -> ConformalRule:
    """The rule for probabilities (N, C) and labels (N,) of calibration images.

    Raises ValueError if there are too few images for this `alpha`.
    """
    num_images = len(labels)
    # 10 · (1 - 0.3) is 7, and not slightly more.
    rank = math.ceil(round((num_images + 1) * (1 - alpha), 9))
    if rank > num_images:
        raise ValueError(
            f"--conformal {alpha:g} needs at least {math.ceil(round(1 / alpha, 9)) - 1} images to calibrate on, not "
            f"{num_images}; add images or raise the share of errors"
        )
    true = scores(probabilities, method).gather(1, labels[:, None]).squeeze(1)
    threshold = float(true.sort().values[rank - 1])
    return ConformalRule(
        method=method,
        alpha=alpha,
        threshold=threshold,
        num_calibration=num_images,
        class_names=list(class_names),
        fingerprint=fingerprint,
    )


def assess(rule: ConformalRule, probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    """Coverage and sizes of the sets on other images: shares in percent, sizes in classes."""
    sets = rule.sets(probabilities)
    sizes = sets.sum(1)
    covered = sets.gather(1, labels[:, None]).squeeze(1).double()
    per_class = {
        name: 100 * float(covered[labels == label].mean())
        for label, name in enumerate(rule.class_names)
        if (labels == label).any()
    }
    return {
        "coverage": 100 * float(covered.mean()),
        "mean_size": float(sizes.double().mean()),
        "one_class": 100 * float((sizes == 1).double().mean()),
        "empty": 100 * float((sizes == 0).double().mean()),
        "num_images": len(labels),
        "coverage_per_class": per_class,
    }


def read_rule(path: Path, *, class_names: Sequence[str], fingerprint: str | None) -> ConformalRule:
    """The rule that `linvit eval --conformal-file` wrote for a model with these classes and this fingerprint.

    Raises ValueError if it cannot be read, or was calibrated for another model or other input. Files of unknown models
    are taken.
    """
    try:
        rule = ConformalRule.model_validate(read_json(path))
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise ValueError(
            f"{path} is not a rule of linvit eval --conformal-file (wrong or missing: {printable(place)})"
        ) from None
    if rule.class_names != list(class_names):
        raise ValueError(
            f"{path} was calibrated for a model with other classes; run linvit eval --conformal-file again"
        )
    if None not in (rule.fingerprint, fingerprint) and rule.fingerprint != fingerprint:
        raise ValueError(
            f"{path} was calibrated for other weights, or for images of another size or preparation; run linvit eval "
            "--conformal-file again, with the model and options of linvit predict"
        )
    return rule
