"""The training loss, mixup and cutmix, and class weights.

Loss and mixing are timm's, chosen from the options as timm's train.py chooses them. Added here are class weights in
cross-entropy, and mixing of batches with an odd number of images, since unreadable images may be left out.

B images, C classes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import yaml
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import create_classification_loss
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.settings.fields import listed, unknown
from linvit.training.options import LossOptions


def create_loss(options: LossOptions, *, class_weights: Tensor | None = None) -> nn.Module:
    """Cross-entropy or binary cross-entropy, for hard, smoothed or mixed labels.

    Args:
        class_weights: factor (C,) for the term of each class, in cross-entropy only.
    """
    if class_weights is not None:
        assert not options.bce_loss
        # timm's Mixup smooths the labels itself.
        return WeightedCrossEntropy(class_weights, smoothing=0.0 if options.uses_mixing else options.smoothing)
    return cast(
        nn.Module,
        create_classification_loss(
            "bce" if options.bce_loss else "ce",
            smoothing=options.smoothing,
            soft_targets=options.uses_mixing,
            pos_weight=options.bce_pos_weight,
            bce_target_thresh=options.bce_target_thresh,
            bce_sum=options.bce_sum,
        ),
    )


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy with class weights for labels (B,) or distributions (B, C), averaged over images.

    For hard labels nn.CrossEntropyLoss divides by the sum of their weights instead of the number of images. Then the
    losses of parts of a batch would not average to the loss of the batch.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, *, smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(
            logits, labels, weight=self.weight, label_smoothing=self.smoothing, reduction="none"
        )  # (B,)
        return losses.mean()


def create_mixup(options: LossOptions, *, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, which draw from numpy's global generator; None if both are disabled."""
    if not options.uses_mixing:
        return None
    return Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        cutmix_minmax=options.cutmix_minmax,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=num_classes,
    )


def mix(mixup: Mixup, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mix images (B, 3, H, W) in place, and labels (B,) into distributions (B, C).

    timm mixes pairs of images, so the last image of an odd number stays unmixed.
    """
    paired = len(images) - len(images) % 2
    if paired == len(images):
        mixed, targets = mixup(images, labels)
        return mixed, targets
    unpaired = mixup_target(labels[paired:], mixup.num_classes, smoothing=mixup.label_smoothing)
    if not paired:
        return images, unpaired
    mixed, targets = mixup(images[:paired], labels[:paired])
    return torch.cat([mixed, images[paired:]]), torch.cat([targets, unpaired])


def read_class_weights(value: str | None, *, class_names: Sequence[str], labels: Sequence[int]) -> Tensor | None:
    """The class weights (C,) of the option `class_weights`; None for None.

    They are scaled to a mean of 1 over the training images, so that the same learning rate remains suitable.

    Args:
        value: "balanced", which gives all classes the same share of the loss, or the path of a YAML or JSON file with a
            line `class name: weight` for each class.
        class_names: name of every label.
        labels: labels of all training images.

    Raises ValueError if the file cannot be read or lacks a weight of at least 0 for some class.
    """
    if value is None:
        return None
    counts = torch.bincount(torch.tensor(labels), minlength=len(class_names)).double()
    if value == "balanced":
        weights = torch.where(counts > 0, 1 / counts, 0.0)
    else:
        weights = torch.tensor(_read_file(Path(value), class_names), dtype=torch.float64)
    mean = (weights * counts).sum() / counts.sum()
    if mean == 0:
        raise ValueError(f"--class-weights {value}: no class with images has a weight above 0")
    return (weights / mean).float()


def _read_file(path: Path, class_names: Sequence[str]) -> list[float]:
    weights: dict[str, float] = {}
    for name, text in _read_pairs(path):
        if name not in class_names:
            raise ValueError(f"--class-weights {path}: {unknown('class', name, class_names)}")
        if name in weights:
            raise ValueError(f"--class-weights {path}: {name!r} appears twice")
        weights[name] = _number(text)
        if not (math.isfinite(weights[name]) and weights[name] >= 0):
            raise ValueError(
                f"--class-weights {path}: the weight of {name!r} must be a number of at least 0, not {text!r}"
            )
    missing = [name for name in class_names if name not in weights]
    if missing:
        raise ValueError(f"--class-weights {path}: no weight for {listed(list(map(repr, missing)), most=5)}")
    return [weights[name] for name in class_names]


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    """The key-value pairs of a YAML or JSON file as text, since a class may be named 1 or no."""
    try:
        document = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"--class-weights {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"--class-weights {path}: is not valid YAML or JSON") from error
    if not isinstance(document, yaml.MappingNode):
        raise ValueError(f"--class-weights {path}: the file must consist of `class name: weight` lines")
    return [(str(name.value), str(weight.value)) for name, weight in document.value]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
