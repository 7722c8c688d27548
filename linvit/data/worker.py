"""The work of a loader's worker processes: read, crop and augment the images of whole batches.

Batches are filled in reused shared memory, because every 4 KiB of fresh memory cost a page fault on the first write.
"""

import ctypes
import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from linvit.data.augment.build import Pipeline, check_image
from linvit.data.cache import ImageCache
from linvit.data.decode import UnreadableImage
from linvit.data.geometry import Size
from linvit.data.sampler import SampleKey, sample_generators
from linvit.data.signals import ignore_outside_signals
from linvit.data.sources.base import ImageSet

# Whether an image that cannot be read ends the iteration or is left out of its batch.
OnBadImage = Literal["stop", "skip"]

# Batches of a worker that are being filled, sent or read at the same time. More are possible, but are not reused.
_POOL_SIZE = 4
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The largest value that glibc accepts for M_MMAP_THRESHOLD.
_MMAP_THRESHOLD = 32 * 2**20
_TRIM_THRESHOLD = 512 * 2**20


@dataclass(frozen=True)
class RawBatch:
    """A batch from a worker: images (B, H, W, 3) uint8, labels (B,) and indices (B,) int64.

    `unreadable` holds the indices of the images left out. `in_use` (1,) uint8 is 1 until the reader releases the
    memory of the images.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    unreadable: tuple[int, ...]
    in_use: torch.Tensor

    def release(self) -> None:
        """Let the worker reuse the memory of the images."""
        self.in_use.zero_()

    def pin_memory(self) -> Self:
        """Copy the batch to page-locked memory; the DataLoader calls this."""
        # The copy has its own flag: after the release, the worker's memory may hold the images of a later batch.
        in_use = torch.ones_like(self.in_use)
        pinned = replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory(), in_use=in_use)
        self.release()
        return pinned


@dataclass(frozen=True)
class Failure:
    """An error message in place of a batch; an exception would arrive as a worker's traceback."""

    message: str


class BatchDataset(Dataset[Any]):
    """Reads whole batches, given the keys of their samples.

    Args:
        pipelines: by the (height, width) of their results.
        epoch_sizes: (height, width) of the images in each epoch; the last also applies to all later epochs.
        cache: images that the pipelines start from. A pipeline whose crop is that of the cache takes them unchanged.
    """

    def __init__(
        self,
        dataset: ImageSet,
        pipelines: Mapping[Size, Pipeline],
        *,
        epoch_sizes: Sequence[Size],
        seed: int,
        on_bad_image: OnBadImage,
        cache: ImageCache | None,
    ) -> None:
        self.dataset = dataset
        self.pipelines = pipelines
        self.epoch_sizes = epoch_sizes
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.cache = cache
        self._buffers = BufferPool()

    def __getitems__(self, keys: list[SampleKey]) -> RawBatch | Failure:
        # The size depends on the epoch alone, because workers outlive epochs and read ahead.
        size = self.epoch_sizes[min(keys[0].epoch, len(self.epoch_sizes) - 1)]
        images, in_use = self._buffers.take((len(keys), *size, 3))
        pixels = images.numpy()
        indices: list[int] = []
        unreadable: list[int] = []
        try:
            for key in keys:
                try:
                    pixels[len(indices)] = self._sample(key, self.pipelines[size])
                except UnreadableImage:
                    if self.on_bad_image == "stop":
                        raise
                    unreadable.append(key.image)
                    continue
                indices.append(key.image)
        except ValueError as error:
            return Failure(str(error))
        labels = torch.tensor([self.dataset.label(index) for index in indices], dtype=torch.int64)
        order = torch.tensor(indices, dtype=torch.int64)
        return RawBatch(images[: len(indices)], labels, order, tuple(unreadable), in_use)

    def _sample(self, key: SampleKey, pipeline: Pipeline) -> np.ndarray:
        pipeline.set_random_state(*sample_generators(self.seed, *key))
        path = self.dataset.path(key.image)
        try:
            if self.cache is None:
                image = pipeline.read(self.dataset.read_bytes(key.image), name=path)
            else:
                image = self.cache.read(key.image)
                if pipeline.crop is not self.cache.crop:
                    image = pipeline(image=image)["image"]
            check_image(image)
        except UnreadableImage:
            raise
        except Exception as error:
            # A user's own pipeline may raise anything.
            raise ValueError(f"{path}: the augmentation failed: {type(error).__name__}: {error}") from error
        return image


class BufferPool:
    """Memory for the batches of one process; a buffer is reused once the reader, in any process, has released it."""

    def __init__(self) -> None:
        self._buffers: deque[torch.Tensor] = deque(maxlen=_POOL_SIZE)

    def take(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images of this shape, uint8, to be filled, and their flag (1,) uint8; setting it to 0 releases them.

        A buffer that leaves the pool while it is in use keeps its memory until its last reader drops it.
        """
        num_bytes = math.prod(shape)
        # The flag is the last byte, so it shares the memory of the images.
        free = (buffer for buffer in self._buffers if len(buffer) == num_bytes + 1 and not buffer[-1])
        buffer = next(free, None)
        if buffer is None:
            buffer = torch.empty(num_bytes + 1, dtype=torch.uint8)
            if get_worker_info() is not None:
                # The worker fills the memory that the main process reads, which saves a copy when the batch is sent.
                buffer.share_memory_()
            self._buffers.append(buffer)
        buffer[-1] = 1
        return buffer[:-1].view(shape), buffer[-1:]


def collate_nothing(batch: Any) -> Any:
    """Return the batch unchanged: `BatchDataset` builds whole batches."""
    return batch


def start_worker(worker: int) -> None:
    """Set up a worker process: its signals, its memory and its number of threads."""
    ignore_outside_signals()
    keep_freed_memory()
    # The workers run in parallel; more threads in each would compete for the same cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def keep_freed_memory() -> None:
    """Make glibc keep the memory of large images for later ones; other C libraries are left as they are.

    By default glibc returns it to the system, and every 4 KiB of new memory cost a page fault.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
            mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
