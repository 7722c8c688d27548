"""Random logits and labels, and the results recorded from them."""

import torch
from torch import Tensor

from linvit.evaluation.metrics import ImageRecords, ImageResults


def random_logits(num_images: int = 60, num_classes: int = 7, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (N, C), correct for about half of the images, and labels (N,) of all classes but the last."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes - 1, (num_images,), generator=generator)
    logits = 2 * torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(num_images), labels] += 2
    return logits, labels


def recorded(logits: Tensor, labels: Tensor) -> ImageResults:
    records = ImageRecords(len(labels), torch.device("cpu"))
    records.add(torch.arange(len(labels)), logits, labels)
    return records.gather()
