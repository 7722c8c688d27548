"""Images seen several ways, test-time augmentation: mirrored, at other sizes, the probabilities averaged."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from linvit.data.loader import Batch, Loader

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
