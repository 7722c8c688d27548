"""Memory for batches that is used again: of fresh memory, each 4 KiB cost a page fault when they are first written.

What is particular to a process that loads images: the signals that end it, and its memory.

What the worker processes of a loader do: read, crop and augment the images of whole batches.
"""

import ctypes
import math
import os
import signal
import sys
import threading
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
from linvit.data.sources.base import ImageSet

# The batches of a worker that are filled, sent or read at a time; one that is kept for longer keeps its memory.
_KEPT = 4


class Buffers:
    """Buffers of one process, each taken again once the reader of the batch in it, in any process, has set it free."""

    def __init__(self) -> None:
        self._kept: deque[torch.Tensor] = deque(maxlen=_KEPT)

    def take(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of this shape, uint8, to be filled, and their mark (1,) uint8: set to 0, it sets them free."""
        num_bytes = math.prod(shape)
        # The mark is the last byte, so that it goes wherever the images go.
        free = (buffer for buffer in self._kept if len(buffer) == num_bytes + 1 and not buffer[-1])
        buffer = next(free, None)
        if buffer is None:
            buffer = torch.empty(num_bytes + 1, dtype=torch.uint8)
            if get_worker_info() is not None:
                # Filled where the main process will read it, instead of copied there when sent.
                buffer.share_memory_()
            self._kept.append(buffer)
        buffer[-1] = 1
        return buffer[:-1].view(shape), buffer[-1:]


# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The largest that glibc takes for the second.
_LARGE_BLOCK = 32 * 2**20
_KEPT_MEMORY = 512 * 2**20


def keep_freed_memory() -> None:
    """Have the C library keep the memory of large images for the next ones, where it is glibc.

    It would give it back to the system, and each 4 KiB of what it fetches anew cost a page fault.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
            mallopt(_M_TRIM_THRESHOLD, _KEPT_MEMORY)


def obey_parent_alone() -> None:
    """Have this process ignore Ctrl-C and SIGUSR1, and SIGTERM unless its parent sends it.

    Terminals and schedulers signal all processes. The main one decides what comes of it, and to finish its step it
    still needs batches: without them it would fail, and save nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name == "posix":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    while sys.platform == "linux":
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)


# Whether an image that cannot be read ends the iteration or is left out of its batch.
OnBadImage = Literal["stop", "skip"]


@dataclass(frozen=True)
class RawBatch:
    """What a worker sends: images (B, H, W, 3) uint8, labels (B,) and indices (B,) int64, what it left out.

    `mark` tells the worker whether the images are still needed where they lie.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    unreadable: tuple[int, ...]
    mark: torch.Tensor

    def release(self) -> None:
        """Lets the worker fill the memory of the images anew."""
        self.mark.zero_()

    def pin_memory(self) -> Self:
        """A copy in page-locked memory; called by the DataLoader."""
        # With a mark of its own: once free, the worker's memory may hold the images of a later batch.
        mark = torch.ones_like(self.mark)
        pinned = replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory(), mark=mark)
        self.release()
        return pinned


@dataclass(frozen=True)
class Failure:
    """Sent in place of a batch, since an exception would arrive as a worker's traceback."""

    message: str


class Samples(Dataset[Any]):
    """Whole batches by the keys of their samples.

    Args:
        pipelines: by the (height, width) that they give.
        epoch_sizes: (height, width) of the images in each epoch, the last also after it.
        cache: what the pipelines begin with, if anything is kept; a batch's pipeline may be all that it keeps.
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
        self._buffers = Buffers()

    def __getitems__(self, keys: list[SampleKey]) -> RawBatch | Failure:
        size = self._size_in(keys[0].epoch)
        images, mark = self._buffers.take((len(keys), *size, 3))
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
        return RawBatch(images[: len(indices)], labels, order, tuple(unreadable), mark)

    def _size_in(self, epoch: int) -> Size:
        """Of the images; a function of the epoch alone, because workers outlive epochs and read ahead."""
        return self.epoch_sizes[min(epoch, len(self.epoch_sizes) - 1)]

    def _sample(self, key: SampleKey, pipeline: Pipeline) -> np.ndarray:
        pipeline.set_random_state(*sample_generators(self.seed, *key))
        try:
            if self.cache is None:
                image = pipeline.read(self.dataset.read_bytes(key.image), name=self.dataset.path(key.image))
            else:
                image = self.cache.read(key.image)
                if pipeline.crop is not self.cache.crop:
                    image = pipeline(image=image)["image"]
            check_image(image)
        except UnreadableImage:
            raise
        except Exception as error:
            # A user's own pipeline may raise anything.
            path = self.dataset.path(key.image)
            raise ValueError(f"{path}: the augmentation fails: {type(error).__name__}: {error}") from error
        return image


def as_is(batch: Any) -> Any:
    """Collates nothing: batches are whole already."""
    return batch


def start_worker(worker: int) -> None:
    """Readies a worker process."""
    obey_parent_alone()
    keep_freed_memory()
    # Workers are the parallelism; more threads in each would fight over the same cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
