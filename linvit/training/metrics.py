"""Accuracy and loss over a data set, exact: from one record per image, however the images were batched and spread.

timm's `ClassificationEvaluator` adds up batch means in the order of the batches; here every image's loss and hits are
kept under its index, so that the result does not depend on the number of processes, an image that was evaluated twice
or not at all is found, and accuracy per class comes for free.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from linvit.training.distributed import sum_over_ranks


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found; accuracies in percent, the loss is the mean cross-entropy."""

    loss: float
    top1: float
    top5: float
    # Those that the values are over.
    num_images: int
    # Accuracy of each class; None for a class without images.
    per_class: dict[str, float | None]
    images_per_class: dict[str, int]
    # Indices of the images that could not be read.
    unreadable: tuple[int, ...] = ()

    def value(self, metric: str) -> float:
        """The metric of that name: top1, top5 or loss."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss}[metric]


def best_of(metrics: Mapping[str, Metrics], metric: str) -> str | None:
    """The name of the best, the first of equals; None where no loss is finite."""
    best = None
    for name, each in metrics.items():
        held = None if best is None else metrics[best].value(metric)
        if math.isfinite(each.loss) and is_better(each.value(metric), held, metric):
            best = name
    return best


def is_better(new: float, old: float | None, metric: str) -> bool:
    """Whether `new` beats `old` (None: nothing yet); a value that is not finite beats nothing."""
    if not math.isfinite(new):
        return False
    return old is None or (new < old if metric == "loss" else new > old)


class ImageRecords:
    """Label, loss and hits of every image of a data set, filled batch by batch on the model's device."""

    def __init__(self, num_images: int, device: torch.device) -> None:
        # Columns: times seen, label, loss, top-1 hit, top-5 hit, unreadable; float32 holds each of them exactly.
        self.records = torch.zeros(num_images, 6, device=device)

    def add(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Record a batch: indices (B,) in the data set, logits (B, C), labels (B,)."""
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, reduction="none")
        best = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
        hits = best == labels[:, None]
        rows = torch.stack(
            [torch.ones_like(loss), labels, loss, hits[:, 0], hits.any(1), torch.zeros_like(loss)], dim=1
        )
        self.records.index_add_(0, indices.to(rows.device), rows)

    def add_unreadable(self, indices: Sequence[int]) -> None:
        """Record images that there is nothing to evaluate of."""
        if indices:
            self.records[list(indices), 5] += 1

    def compute(self, class_names: Sequence[str]) -> Metrics:
        """The metrics over the images of all processes; every image must have been recorded exactly once.

        Raises ValueError where none of them could be read.
        """
        records = sum_over_ranks(self.records).cpu().double()
        seen, unreadable = records[:, 0], records[:, 5]
        assert bool((seen + unreadable == 1).all()), (
            f"evaluated {int(seen.sum())} times, not each of {len(seen)} images once"
        )
        _, labels, losses, top1, top5, _ = records[seen == 1].unbind(1)
        num_images = len(labels)
        if not num_images:
            raise ValueError(f"none of the {len(seen)} images to evaluate on can be read; restore them")
        images = torch.bincount(labels.long(), minlength=len(class_names)).tolist()
        hits = torch.bincount(labels.long(), weights=top1, minlength=len(class_names)).tolist()
        return Metrics(
            # fsum rounds once, so that no order of the images changes the last digit.
            loss=math.fsum(losses.tolist()) / num_images,
            top1=100 * top1.sum().item() / num_images,
            top5=100 * top5.sum().item() / num_images,
            num_images=num_images,
            per_class={
                name: 100 * hit / count if count else None for name, hit, count in zip(class_names, hits, images)
            },
            images_per_class=dict(zip(class_names, images)),
            unreadable=tuple(unreadable.nonzero().flatten().tolist()),
        )
