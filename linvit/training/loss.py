"""The training loss and the mixing of batches, from timm, chosen as timm's script chooses them."""

from typing import cast

from timm.data import Mixup
from timm.loss import create_classification_loss
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.training.options import LossOptions


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
