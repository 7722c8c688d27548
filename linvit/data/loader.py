"""Loaders that yield normalised batches on the device, for training and evaluation.

Worker processes send uint8 images. They are normalised on the device, and on a GPU the next batch is copied while the
current one is processed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch.utils.data import DataLoader

from linvit.data.augment.build import InputSpec, Pipeline, build_eval_pipeline, build_train_pipeline
from linvit.data.cache import ImageCache
from linvit.data.geometry import FitShorterSide, Size
from linvit.data.options import AugmentOptions, CacheOptions
from linvit.data.sampler import EvalSampler, SampleKey, TrainSampler
from linvit.data.sources.base import ImageSet
from linvit.data.worker import BatchDataset, Failure, OnBadImage, RawBatch, collate_nothing, start_worker

# By default, cached training images have this many times the input's longer side in their shorter side, so that random
# crops keep detail.
_CACHE_OVERSAMPLING = 2

Raw = TypeVar("Raw")


@dataclass(frozen=True)
class Batch:
    """Normalised images (B, 3, H, W) and labels (B,) int64 on the device; data set indices (B,) int64 on the CPU.

    B is below the batch size, possibly 0, if images could not be read and `on_bad_image` is "skip".
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    # Indices of the images left out.
    unreadable: tuple[int, ...] = ()


class Loader:
    """Batches of one epoch at a time; iterate over the loader, or over `iter_from` to start in the middle.

    A sample depends on the seed, the epoch and its index alone. Only one iteration may run at a time.

    Attributes:
        batch_size: images per batch of this process.
        num_images: images per epoch of this process.
        class_names: name of every label.
        cache: cache of decoded images, or None.
    """

    def __init__(
        self,
        dataset: ImageSet,
        pipelines: Mapping[Size, Pipeline],
        spec: InputSpec,
        sampler: TrainSampler | EvalSampler,
        *,
        seed: int,
        workers: int,
        device: torch.device | str,
        pin_memory: bool,
        channels_last: bool,
        dtype: torch.dtype,
        epoch_sizes: Sequence[Size] = (),
        on_bad_image: OnBadImage = "stop",
        cache: ImageCache | None = None,
    ) -> None:
        self.batch_size = sampler.batch_size
        self.num_images = sampler.num_samples
        self.class_names = dataset.class_names
        self.cache = cache
        self._spec = spec
        self._device = torch.device(device)
        self._channels_last = channels_last
        self._dtype = dtype
        self._batches = _BatchSampler(sampler)
        self._loader: DataLoader[Any] = DataLoader(
            BatchDataset(
                dataset,
                pipelines,
                epoch_sizes=tuple(epoch_sizes) or (spec.size,),
                seed=seed,
                on_bad_image=on_bad_image,
                cache=cache,
            ),
            batch_sampler=self._batches,
            num_workers=workers,
            collate_fn=collate_nothing,
            worker_init_fn=start_worker,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            # The DataLoader draws a seed for its workers in each iteration, which must not advance torch's generator.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._batches.sampler)

    @property
    def img_size(self) -> Size:
        """(height, width) of the images, unless it changes from epoch to epoch."""
        return self._spec.size

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration."""
        self._batches.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        return self.iter_from(0)

    def iter_from(self, batch: int) -> Iterator[Batch]:
        """The batches of the current epoch from number `batch` on.

        Raises:
            ValueError: if an image cannot be read and `on_bad_image` is "stop", or if an augmentation fails; the
                message names the file.
        """
        assert 0 <= batch <= len(self), f"batch {batch} of {len(self)}"
        self._batches.first = batch
        yield from prefetch(self._loader, self._send, self._device)

    def _send(self, raw: RawBatch | Failure) -> Batch:
        """Copy a batch to the device and normalise it there; the copy may still be under way on return."""
        if isinstance(raw, Failure):
            raise ValueError(raw.message)
        # Unless the memory is page-locked, the copy must finish before the worker reuses it.
        images = normalize(
            raw.images.to(self._device, non_blocking=raw.images.is_pinned()),
            self._spec,
            dtype=self._dtype,
            channels_last=self._channels_last,
        )
        labels = raw.labels.to(self._device, non_blocking=True)
        raw.release()
        return Batch(images, labels, raw.indices, raw.unreadable)


def create_train_loader(
    dataset: ImageSet,
    augment: AugmentOptions,
    spec: InputSpec,
    *,
    batch_size: int,
    seed: int,
    workers: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    sampling: Literal["shuffle", "balanced"] = "shuffle",
    repeats: float = 1.0,
    epoch_sizes: Sequence[Size] = (),
    on_bad_image: OnBadImage = "stop",
    caching: CacheOptions | None = None,
) -> Loader:
    """Create a loader of shuffled, augmented batches of equal size; the incomplete last batch is dropped.

    Args:
        sampling: "shuffle" draws every image once per epoch, "balanced" every class equally often.
        repeats: how many times to draw each image; the epoch has fewer distinct images accordingly.
        epoch_sizes: (height, width) of the images in each epoch; the last also applies to all later epochs. Default:
            `spec.size`.
        on_bad_image: "stop" raises an error for an image that cannot be read, "skip" leaves it out of its batch.
        caching: cache decoded images, with their shorter side shrunk to `cache_size`; pipelines start from these.

    Raises:
        ValueError: if the images do not fill one batch, `aug_file` is invalid, or `cache_size` is below the input
            size.
    """
    sampler = TrainSampler(
        len(dataset),
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        repeats=repeats,
        labels=dataset.labels if sampling == "balanced" else None,
    )
    sizes = set(epoch_sizes) or {spec.size}
    return Loader(
        dataset,
        {size: build_train_pipeline(augment, replace(spec, size=size)) for size in sizes},
        spec,
        sampler,
        seed=seed,
        workers=workers,
        device=device,
        pin_memory=pin_memory,
        channels_last=channels_last,
        dtype=dtype,
        epoch_sizes=epoch_sizes,
        on_bad_image=on_bad_image,
        cache=_train_cache(caching, dataset, spec, largest=max(map(max, sizes))),
    )


def create_eval_loader(
    dataset: ImageSet,
    spec: InputSpec,
    *,
    batch_size: int,
    workers: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    on_bad_image: OnBadImage = "stop",
    caching: CacheOptions | None = None,
) -> Loader:
    """Create a loader of every image exactly once over all ranks, in order; the last batch may be smaller.

    With `on_bad_image="skip"`, images that cannot be read are listed in their batch's `unreadable`. `caching` caches
    the images after the crop, as the model sees them.
    """
    pipeline = build_eval_pipeline(spec)
    assert pipeline.crop is not None
    cache = None
    if caching is not None and caching.cache is not None:
        cache = ImageCache(caching, dataset, pipeline.crop, input_range=spec.input_range)
    sampler = EvalSampler(len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
    return Loader(
        dataset,
        {spec.size: pipeline},
        spec,
        sampler,
        seed=0,
        workers=workers,
        device=device,
        pin_memory=pin_memory,
        channels_last=channels_last,
        dtype=dtype,
        on_bad_image=on_bad_image,
        cache=cache,
    )


def _train_cache(
    options: CacheOptions | None, dataset: ImageSet, spec: InputSpec, *, largest: int
) -> ImageCache | None:
    """A cache of full images, which are cropped differently in each epoch, to at most `largest` pixels per side."""
    if options is None or options.cache is None:
        return None
    side = options.cache_size or _CACHE_OVERSAMPLING * largest
    if side < largest:
        raise ValueError(f"cache_size {side} is below the input's {largest} pixels; set at least {largest}")
    return ImageCache(options, dataset, FitShorterSide(side), input_range=spec.input_range)


class _BatchSampler:
    """The batches of the current epoch for the DataLoader, from number `first` on."""

    def __init__(self, sampler: TrainSampler | EvalSampler) -> None:
        self.sampler = sampler
        self.epoch = 0
        self.first = 0

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return self.sampler.batches(self.epoch, self.first)

    def __len__(self) -> int:
        return len(self.sampler) - self.first


def normalize(
    images: torch.Tensor, spec: InputSpec, *, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> torch.Tensor:
    """Turn (B, H, W, 3) uint8 into (B, 3, H, W): (x / 255 - mean) / std in float32, then `dtype`, on their device."""
    mean, std = _mean_and_std(spec.mean, spec.std, images.device)
    # Change the layout first: the arithmetic is several times faster over planes than over pixels.
    layout = torch.channels_last if channels_last else torch.contiguous_format
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
    return planes.div_(255).sub_(mean).div_(std).to(dtype)


@cache
def _mean_and_std(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std on the device; cached, because a copy for every batch would wait for the work queued before it."""
    return torch.tensor(mean, device=device).view(3, 1, 1), torch.tensor(std, device=device).view(3, 1, 1)


def prefetch(source: Iterable[Raw], send: Callable[[Raw], Batch], device: torch.device) -> Iterator[Batch]:
    """Yield `send(item)` for each item; on a GPU, one item ahead and on a separate stream.

    An error in `send` is raised after all batches before it have been yielded.
    """
    if device.type == "cuda":
        yield from _prefetch_on_stream(source, send, torch.cuda.Stream(device))
    else:
        yield from map(send, source)


def _prefetch_on_stream(
    source: Iterable[Raw], send: Callable[[Raw], Batch], stream: torch.cuda.Stream
) -> Iterator[Batch]:
    ready: tuple[Batch, torch.cuda.Event] | None = None
    for raw in source:
        try:
            with torch.cuda.stream(stream):
                following = send(raw), stream.record_event()
        except ValueError:
            if ready is not None:
                yield _synchronize(*ready)
            raise
        if ready is not None:
            yield _synchronize(*ready)
        ready = following
    if ready is not None:
        yield _synchronize(*ready)


def _synchronize(batch: Batch, sent: torch.cuda.Event) -> Batch:
    """Make the current stream wait until all of the batch has arrived."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(sent)
    for tensor in (batch.images, batch.labels):
        # Otherwise the allocator could reuse the memory for a later batch while this stream still reads it.
        tensor.record_stream(current)
    return batch
