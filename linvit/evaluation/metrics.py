"""Exact accuracy and loss over a data set, independent of batches and processes.

timm's `ClassificationEvaluator` sums batch means in the order of the batches. Here the loss and hits of every image are
recorded under its index: the result does not depend on the number of processes, an image that was evaluated twice or
not at all is detected, and accuracy per class needs no extra work.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from linvit.distributed import sum_over_ranks


@dataclass(frozen=True)
class Metrics:
    """Accuracies in percent, and the mean cross-entropy loss."""

    loss: float
    top1: float
    top5: float
    # Number of images that were read and evaluated.
    num_images: int
    # Accuracy of each class; None for a class without images.
    per_class: dict[str, float | None]
    images_per_class: dict[str, int]
    # Indices of the images that could not be read.
    unreadable: tuple[int, ...] = ()
    # What the metrics were computed from.
    results: "ImageResults | None" = field(default=None, compare=False, repr=False)

    def value(self, metric: str) -> float:
        """The value of the metric "top1", "top5" or "loss"."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss}[metric]


def best_of(metrics: Mapping[str, Metrics], metric: str) -> str | None:
    """The name of the best metrics, the first of equals; None if no loss is finite."""
    best = None
    for name, each in metrics.items():
        best_value = None if best is None else metrics[best].value(metric)
        if math.isfinite(each.loss) and is_better(each.value(metric), best_value, metric):
            best = name
    return best


def is_better(new: float, old: float | None, metric: str) -> bool:
    """Whether `new` beats `old`, or is the first value if that is None; a value that is not finite beats nothing."""
    if not math.isfinite(new):
        return False
    return old is None or (new < old if metric == "loss" else new > old)


@dataclass(frozen=True)
class ImageResults:
    """The results of the N images that could be read, in the order of the data set: tensors (N,) on the CPU."""

    # Indices in the data set.
    indices: Tensor
    labels: Tensor
    # Cross-entropy in nats, float64.
    losses: Tensor
    # The most probable class, and its softmax probability, float64.
    predictions: Tensor
    probabilities: Tensor
    # Whether the label is among the five most probable classes.
    in_top5: Tensor
    # Indices of the images that could not be read.
    unreadable: tuple[int, ...] = ()

    @property
    def correct(self) -> Tensor:
        return self.predictions == self.labels

    def take(self, rows: Tensor) -> "ImageResults":
        """The results of some of the images, selected by position."""
        return replace(
            self,
            indices=self.indices[rows],
            labels=self.labels[rows],
            losses=self.losses[rows],
            predictions=self.predictions[rows],
            probabilities=self.probabilities[rows],
            in_top5=self.in_top5[rows],
        )

    def metrics(self, class_names: Sequence[str]) -> Metrics:
        """Means over all images, and accuracy over the images of each class."""
        num_images = len(self.labels)
        images = torch.bincount(self.labels, minlength=len(class_names)).tolist()
        hits = torch.bincount(self.labels[self.correct], minlength=len(class_names)).tolist()
        return Metrics(
            # fsum rounds once, so the order of the images does not change the last digit.
            loss=math.fsum(self.losses.tolist()) / num_images,
            top1=100 * int(self.correct.sum()) / num_images,
            top5=100 * int(self.in_top5.sum()) / num_images,
            num_images=num_images,
            per_class={
                name: 100 * hit / count if count else None for name, hit, count in zip(class_names, hits, images)
            },
            images_per_class=dict(zip(class_names, images)),
            unreadable=self.unreadable,
            results=self,
        )


class ImageRecords:
    """Results of every image of a data set, recorded batch by batch on the model's device in 28 bytes per image."""

    def __init__(self, num_images: int, device: torch.device) -> None:
        # Columns: times seen, label, loss, prediction, its probability, top-5 hit, unreadable. float32 is exact for all
        # of them, for labels and predictions below 2^24.
        self.records = torch.zeros(num_images, 7, device=device)

    def add(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Record a batch: indices (B,) in the data set, logits (B, C), labels (B,)."""
        logits = logits.float()
        log_probabilities = logits.log_softmax(1)
        loss = F.nll_loss(log_probabilities, labels, reduction="none")
        best = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
        probability = log_probabilities.gather(1, best[:, :1]).squeeze(1).exp()
        in_top5 = (best == labels[:, None]).any(1)
        rows = torch.stack(
            [torch.ones_like(loss), labels, loss, best[:, 0], probability, in_top5, torch.zeros_like(loss)], dim=1
        )
        self.records.index_add_(0, indices.to(rows.device), rows)

    def add_unreadable(self, indices: Sequence[int]) -> None:
        """Record images that could not be read."""
        if indices:
            self.records[list(indices), 6] += 1

    def gather(self) -> ImageResults:
        """The results of all processes. All of them must call this; every image must have been recorded exactly once.

        Raises ValueError if none of the images could be read.
        """
        records = sum_over_ranks(self.records).cpu()
        seen, unreadable = records[:, 0], records[:, 6]
        assert bool((seen + unreadable == 1).all()), (
            f"evaluated {int(seen.sum())} times, not each of {len(seen)} images once"
        )
        indices = seen.nonzero().flatten()
        if not len(indices):
            raise ValueError(f"none of the {len(seen)} images to evaluate on can be read; restore them")
        _, labels, losses, predictions, probabilities, in_top5, _ = records[indices].unbind(1)
        return ImageResults(
            indices=indices,
            labels=labels.long(),
            losses=losses.double(),
            predictions=predictions.long(),
            probabilities=probabilities.double(),
            in_top5=in_top5.bool(),
            unreadable=tuple(unreadable.nonzero().flatten().tolist()),
        )

    def compute(self, class_names: Sequence[str]) -> Metrics:
        """The metrics of all processes; see `gather`."""
        return self.gather().metrics(class_names)
