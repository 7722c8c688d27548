"""A set of images under a model's labels, without those of classes that the model does not know.

Images seen several ways, test-time augmentation: mirrored, at other sizes, the probabilities averaged.

Running a model over all images, and what is kept of each.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from linvit.data.loader import Batch, Loader
from linvit.data.sources.base import ImageSet
from linvit.distributed import largest_over_ranks, sum_over_ranks
from linvit.evaluation.classes import ClassMatch
from linvit.evaluation.inference import BatchForward, ShardedForward
from linvit.evaluation.metrics import ImageRecords, ImageResults, Metrics
from linvit.output.terminal import note


class RelabelledImages(ImageSet):
    """The images of another set, in its order, whose labels are those of a model.

    Args:
        images: whose class names were matched.
        match: tells the model's label of each of their classes.

    Attributes:
        kept: index of each image in the other set, ascending, (N,).
    """

    def __init__(self, images: ImageSet, match: ClassMatch) -> None:
        labels = np.array([-1 if label is None else label for label in match.labels])[np.asarray(images.labels)]
        self._images = images
        self.kept = np.flatnonzero(labels >= 0)
        super().__init__(images.root, split=images.split, class_names=match.class_names, labels=labels[self.kept])

    def path(self, index: int) -> Path:
        return self._images.path(int(self.kept[index]))

    def read_bytes(self, index: int) -> bytes:
        return self._images.read_bytes(int(self.kept[index]))


Flips = Literal["none", "hflip"]


def see(
    forwards: Sequence[Callable[[Tensor], Tensor]], loaders: Sequence[Loader], *, flips: Flips
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of the first loader with logits (B, C): those of the one view, or the log of the mean probability.

    Args:
        forwards: for each loader, from its images to logits.
        loaders: of the same images, at as many sizes.
        flips: whether each is seen as it is only, or mirrored too.
    """
    for batches in zip(*loaders, strict=True):
        assert all(torch.equal(batch.indices, batches[0].indices) for batch in batches)
        if not len(batches[0].images):
            yield batches[0], torch.empty(0)
            continue
        views = []
        for forward, batch in zip(forwards, batches):
            views.append(forward(batch.images))
            if flips == "hflip":
                views.append(forward(batch.images.flip(3)))
        yield batches[0], views[0] if len(views) == 1 else mean_log_probability(views)


def mean_log_probability(views: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of several predictions' probabilities, from their logits, each (B, C)."""
    stacked = torch.stack([view.float().log_softmax(1) for view in views])
    return stacked.logsumexp(0) - math.log(len(views))


def scaled_size(size: tuple[int, int], scale: float, *, multiple: int) -> tuple[int, int]:
    """A (height, width) times `scale`, each side the nearest multiple, of at least one."""
    height, width = (max(round(side * scale / multiple), 1) * multiple for side in size)
    return height, width


@dataclass(frozen=True)
class Collected:
    """What an evaluation keeps, the same in all processes."""

    results: ImageResults
    # With the logits of the classes that the data lacks left out; None where it lacks none.
    masked: ImageResults | None
    # (N, C) of the images in `results`, where they were asked for.
    logits: Tensor | None


@torch.no_grad()
def collect(
    models: Sequence[nn.Module],
    loaders: Sequence[Loader],
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    say: Callable[[str], object],
    flips: Flips = "none",
    present: Sequence[int] | None = None,
    num_logits: int | None = None,
) -> Collected:
    """Evaluate over all images of a loader, and of the loaders of all other processes.

    Args:
        models: on `device`, left in the mode that they were in; one for each loader, which all show the same images.
            One with sharded weights is called equally often in all processes.
        amp_dtype: precision of automatic mixed precision; None is off.
        say: takes a sentence where a batch did not fit in memory and is halved from then on.
        present: labels, ascending, to which predictions are also confined.
        num_logits: keep the logits, of so many classes, in 4 bytes an image and class; the rest takes 28 bytes an
            image, and as many again with `present`.
    """
    own = torch.tensor(loaders[0].num_images, device=device)
    num_images = int(sum_over_ranks(own).item())
    records = ImageRecords(num_images, device)
    masked = None if present is None else ImageRecords(num_images, device)
    columns = None if present is None else torch.tensor(present, device=device)
    kept = None if num_logits is None else torch.zeros(num_images, num_logits)
    forwards: list[BatchForward | ShardedForward] = []
    for model, loader in zip(models, loaders):
        if isinstance(model, FSDPModule):
            num_calls = largest_over_ranks(len(loader), device) * (2 if flips == "hflip" else 1)
            forwards.append(ShardedForward(model, device=device, amp_dtype=amp_dtype, num_calls=num_calls))
        else:
            forwards.append(BatchForward(model, device=device, amp_dtype=amp_dtype, say=say))
    with _evaluating(models):
        for batch, logits in see(forwards, loaders, flips=flips):
            records.add_unreadable(batch.unreadable)
            if masked is not None:
                masked.add_unreadable(batch.unreadable)
            if not len(logits):
                continue
            records.add(batch.indices, logits, batch.labels)
            if masked is not None and columns is not None:
                masked.add(batch.indices, logits[:, columns], torch.searchsorted(columns, batch.labels))
            if kept is not None:
                kept[batch.indices] = logits.float().cpu()
        for forward, loader in zip(forwards, loaders):
            if isinstance(forward, ShardedForward):
                forward.finish(loader.img_size)
    results = records.gather()
    return Collected(
        results,
        None if masked is None or columns is None else _relabelled(masked.gather(), columns.cpu()),
        None if kept is None else sum_over_ranks(kept.to(device)).cpu()[results.indices],
    )


def _relabelled(results: ImageResults, columns: Tensor) -> ImageResults:
    """Results whose classes are numbered by their place in `columns`, under the model's labels."""
    return replace(results, labels=columns[results.labels], predictions=columns[results.predictions])


@contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    were_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in zip(models, were_training):
            model.train(was_training)


def evaluate(
    model: nn.Module, loader: Loader, *, device: torch.device, amp_dtype: torch.dtype | None = None
) -> Metrics:
    """Metrics of a model over all images of a loader, and of the loaders of all other processes.

    Args:
        model: left in the mode that it was in; a copy is evaluated where it lies on another device.
        loader: from `create_eval_loader`, its images on `device`.
        amp_dtype: precision of automatic mixed precision; None is off.

    A batch that does not fit in memory is halved, which is said on stderr; with sharded weights it raises ValueError.
    """
    if next(model.parameters()).device != device:
        model = copy.deepcopy(model).to(device)
    found = collect([model], [loader], device=device, amp_dtype=amp_dtype, say=note)
    return found.results.metrics(loader.class_names)
