"""Mixing the images and labels of a batch that may lack some of its images.

A weight for every class in the loss: the inverse of how many images it has, or from a file.

The training loss and the mixing of batches, from timm, chosen as timm's script chooses them.
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

from linvit.settings.fields import unknown
from linvit.training.options import LossOptions


def mix(mixup: Mixup, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """timm's mixing of images (B, 3, H, W), in place, and labels (B,), which become (B, C).

    timm mixes pairs alone; of an odd number the last image stays as it is.
    """
    paired = len(images) - len(images) % 2
    if paired == len(images):
        mixed, targets = mixup(images, labels)
        return mixed, targets
    alone = mixup_target(labels[paired:], mixup.num_classes, smoothing=mixup.label_smoothing)
    if not paired:
        return images, alone
    mixed, targets = mixup(images[:paired], labels[:paired])
    return torch.cat([mixed, images[paired:]]), torch.cat([targets, alone])


def read_class_weights(value: str | None, *, class_names: Sequence[str], labels: Sequence[int]) -> Tensor | None:
    """The weights (C,) that `class_weights` means, scaled to a mean of 1 over the training images; None for none.

    So the learning rate keeps its meaning. "balanced" gives all classes the same share of the loss; anything else is a
    YAML or JSON file with a line `class name: weight` for each class.

    Args:
        class_names: name of every label.
        labels: of all training images.

    Raises ValueError where the file cannot be read, or does not give each class a weight of at least 0.
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
            raise ValueError(f"--class-weights {path}: {name!r} is there twice")
        weights[name] = _number(text)
        if not (math.isfinite(weights[name]) and weights[name] >= 0):
            raise ValueError(f"--class-weights {path}: {name!r} needs a number of at least 0, not {text!r}")
    missing = [name for name in class_names if name not in weights]
    if missing:
        raise ValueError(f"--class-weights {path}: gives no weight to {', '.join(map(repr, missing[:5]))}")
    return [weights[name] for name in class_names]


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    """The pairs of a YAML or JSON file as text, since classes may be called 1 or no."""
    try:
        document = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"--class-weights {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--class-weights {path}: is not valid YAML or JSON") from error
    if not isinstance(document, yaml.MappingNode):
        raise ValueError(f"--class-weights {path}: holds something else than lines of `class name: weight`")
    return [(str(name.value), str(weight.value)) for name, weight in document.value]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def mixes(options: LossOptions) -> bool:
    """Whether mixup or cutmix is on."""
    return options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None


def create_mixup(options: LossOptions, *, num_classes: int) -> Mixup | None:
    """Mixup and cutmix of a batch's images and labels, from numpy's global generator; None where neither is on."""
    if not mixes(options):
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


def create_loss(options: LossOptions, *, class_weights: Tensor | None = None) -> nn.Module:
    """Cross-entropy or binary cross-entropy, for hard, smoothed or mixed labels.

    `class_weights` (C,), of cross-entropy alone, multiply each class's part of it.
    """
    if class_weights is not None:
        assert not options.bce_loss
        # Mixing smooths the labels itself.
        return WeightedCrossEntropy(class_weights, smoothing=0.0 if mixes(options) else options.smoothing)
    return cast(
        nn.Module,
        create_classification_loss(
            "bce" if options.bce_loss else "ce",
            smoothing=options.smoothing,
            soft_targets=mixes(options),
            pos_weight=options.bce_pos_weight,
            bce_target_thresh=options.bce_target_thresh,
            bce_sum=options.bce_sum,
        ),
    )


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy with a weight for every class, for labels (B,) or distributions (B, C); the mean over images.

    nn.CrossEntropyLoss divides by the labels' weights instead where labels are hard, so that parts of a batch would not
    add up to the whole.
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
