"""A batch of images on the device, and their normalisation there.

Batches on their way to a GPU while it works on the ones before them.

Batches for training and evaluation: uint8 from the workers to the device, normalised there.
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
from linvit.data.worker import Failure, OnBadImage, RawBatch, Samples, as_is, start_worker


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, H, W) normalised and labels (B,) int64 on the device; dataset indices (B,) int64 on the CPU.

    B is less than the batch size, even 0, where images could not be read and are to be left out.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    # Indices of the images left out.
    unreadable: tuple[int, ...] = ()


def normalize(
    images: torch.Tensor, spec: InputSpec, *, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W): (x / 255 - mean) / std in float32, then `dtype`, on the images' device."""
    mean, std = _mean_and_std(spec.mean, spec.std, images.device)
    # Laid out before the arithmetic, which is several times as fast over planes as over pixels.
    layout = torch.channels_last if channels_last else torch.contiguous_format
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
    return planes.div_(255).sub_(mean).div_(std).to(dtype)


@cache
def _mean_and_std(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept on the device: a copy for every batch would wait for the work queued before it."""
    return torch.tensor(mean, device=device).view(3, 1, 1), torch.tensor(std, device=device).view(3, 1, 1)


Raw = TypeVar("Raw")


def prefetched(source: Iterable[Raw], send: Callable[[Raw], Batch], device: torch.device) -> Iterator[Batch]:
    """What `send` makes of each item; to a GPU, along a stream of its own and one item ahead of what is asked for.

    An error in sending is raised after the batches before it were handed out.
    """
    if device.type == "cuda":
        yield from _ahead(source, send, torch.cuda.Stream(device))
    else:
        yield from map(send, source)


def _ahead(source: Iterable[Raw], send: Callable[[Raw], Batch], stream: torch.cuda.Stream) -> Iterator[Batch]:
    ready: tuple[Batch, torch.cuda.Event] | None = None
    for raw in source:
        try:
            with torch.cuda.stream(stream):
                following = send(raw), stream.record_event()
        except ValueError:
            if ready is not None:
                yield _arrived(*ready)
            raise
        if ready is not None:
            yield _arrived(*ready)
        ready = following
    if ready is not None:
        yield _arrived(*ready)


def _arrived(batch: Batch, sent: torch.cuda.Event) -> Batch:
    """The batch for the current stream, whose work on it begins when all of it is there."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(sent)
    for tensor in (batch.images, batch.labels):
        # Otherwise the memory could be given to a later batch while this stream still reads it.
        tensor.record_stream(current)
    return batch


# How many times the input's longer side cached training images have in their shorter one, for random crops.
_CACHED_DETAIL = 2


class Loader:
    """Batches of one epoch at a time; iterate over it, or over `iter_from` to start in the middle.

    What a sample looks like depends on the seed, the epoch and its index alone. Only one iteration at a time.

    Attributes:
        batch_size: images in a batch of this process.
        num_images: images that this process sees in an epoch.
        class_names: name of every label.
        cache: what is kept of the images for later epochs, if anything is.
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
        self.num_images = sampler.num_drawn
        self.class_names = dataset.class_names
        self.cache = cache
        self._spec = spec
        self._device = torch.device(device)
        self._channels_last = channels_last
        self._dtype = dtype
        self._keys = _Keys(sampler)
        self._loader: DataLoader[Any] = DataLoader(
            Samples(
                dataset,
                pipelines,
                epoch_sizes=tuple(epoch_sizes) or (spec.size,),
                seed=seed,
                on_bad_image=on_bad_image,
                cache=cache,
            ),
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=as_is,
            worker_init_fn=start_worker,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            # Each iteration draws a number for the workers, which nothing here uses: not from torch's own generator.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._keys.sampler)

    @property
    def img_size(self) -> Size:
        """(height, width) of the images, unless it changes from epoch to epoch."""
        return self._spec.size

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch that the next iteration reads."""
        self._keys.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        return self.iter_from(0)

    def iter_from(self, batch: int) -> Iterator[Batch]:
        """Batches of the current epoch from number `batch` on.

        Raises:
            ValueError: naming the file, where an image cannot be read and is not to be left out.
        """
        assert 0 <= batch <= len(self), f"batch {batch} of {len(self)}"
        self._keys.first = batch
        yield from prefetched(self._loader, self._send, self._device)

    def _send(self, raw: RawBatch | Failure) -> Batch:
        """The batch, normalised on the device; it may still be on its way there."""
        if isinstance(raw, Failure):
            raise ValueError(raw.message)
        # From memory that is not page-locked a copy must be over before the worker fills it anew.
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
    """Shuffled and augmented batches of equal size; what is left of an epoch after the last whole batch is not used.

    Args:
        sampling: every image once an epoch, or every class equally often.
        repeats: show each image so often in an epoch, and fewer of them.
        epoch_sizes: (height, width) of the images in each epoch, the last also after it; default `spec.size`.
        on_bad_image: whether an image that cannot be read ends the iteration or is left out of its batch.
        caching: keep the decoded images, their shorter side brought down to `cache_size`; pipelines begin with those.

    Raises:
        ValueError: where the images do not fill one batch, for an `aug_file` that cannot be used, or a `cache_size`
            below the input's.
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
        cache=_cache_whole(caching, dataset, largest=max(map(max, sizes))),
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
    """Every image exactly once over all ranks, in order, without padding: the last batch may be smaller.

    With `on_bad_image="skip"` a batch names the images that it lacks because they cannot be read. `caching` keeps the
    pixels that the model sees.
    """
    pipeline = build_eval_pipeline(spec)
    assert pipeline.crop is not None
    cache = ImageCache(caching, dataset, pipeline.crop) if caching is not None and caching.cache is not None else None
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


def _cache_whole(options: CacheOptions | None, dataset: ImageSet, *, largest: int) -> ImageCache | None:
    """Keeps whole images, to be cropped anew in each epoch to at most `largest` pixels in a side."""
    if options is None or options.cache is None:
        return None
    side = options.cache_size or _CACHED_DETAIL * largest
    if side < largest:
        raise ValueError(f"cache_size {side} is below the input's {largest} pixels; set at least {largest}")
    return ImageCache(options, dataset, FitShorterSide(side))


class _Keys:
    """Tells the workers which batches to read, and from where on."""

    def __init__(self, sampler: TrainSampler | EvalSampler) -> None:
        self.sampler = sampler
        self.epoch = 0
        self.first = 0

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return self.sampler.batches(self.epoch, self.first)

    def __len__(self) -> int:
        return len(self.sampler) - self.first
