"""Image sizes that grow through training: shorter sequences at first, the model's own size at the end.

The model is built at the last size with `dynamic_img_size=True`: for other grids the position embedding is resampled
and E and F are remapped by overlap area with every batch, so that no parameter, gradient or moment ever changes shape.
"""

import copy
from collections.abc import Sequence

import torch

from linvit.files import reason
from linvit.timmmodel import TimmModel
from linvit.training.options import ScheduleOptions


def size_in(epoch: int, options: ScheduleOptions) -> int | None:
    """The size of that epoch's images: the epochs are divided evenly; None where `train_img_sizes` is not set."""
    sizes = options.train_img_sizes
    if sizes is None:
        return None
    return sizes[min(epoch * len(sizes) // options.epochs, len(sizes) - 1)]


def epoch_sizes(options: ScheduleOptions) -> list[tuple[int, int]]:
    """(height, width) of each epoch's images, of later epochs those of the last; empty where sizes do not change."""
    sizes = [size_in(epoch, options) for epoch in range(options.epochs)]
    return [(size, size) for size in sizes if size is not None]


def check_sizes(model: TimmModel, sizes: Sequence[int]) -> None:
    """Raise ValueError for the first size that the model does not take."""
    # There a forward pass costs nothing.
    shadow = copy.deepcopy(model).to("meta")
    for size in sizes:
        try:
            shadow(torch.empty(1, 3, size, size, device="meta"))
        except (AssertionError, ValueError, RuntimeError) as error:
            raise ValueError(f"--train-img-sizes: the model does not take {size}×{size} px: {reason(error)}") from error
