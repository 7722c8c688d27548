"""Mixing the images and labels of a batch that may lack some of its images."""

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor


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
