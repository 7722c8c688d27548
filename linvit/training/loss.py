"""The training loss and the mixing of batches, from timm, chosen as timm's script chooses them."""

from timm.data import Mixup
from timm.loss import create_classification_loss
from torch import nn

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


def create_loss(options: LossOptions) -> nn.Module:
    """Cross-entropy or binary cross-entropy, for hard, smoothed or mixed labels."""
    return create_classification_loss(
        "bce" if options.bce_loss else "ce",
        smoothing=options.smoothing,
        soft_targets=mixes(options),
        pos_weight=options.bce_pos_weight,
        bce_target_thresh=options.bce_target_thresh,
        bce_sum=options.bce_sum,
    )
