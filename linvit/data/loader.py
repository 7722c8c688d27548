"""Batches for training and evaluation: uint8 from the workers to the device, normalised there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from linvit.data.augfile import check_image
from linvit.data.geometry import Size
from linvit.data.imageset import ImageSet
from linvit.data.options import AugmentOptions
from linvit.data.read import UnreadableImage
from linvit.data.sampler import EvalSampler, SampleKey, TrainSampler, sample_generators
from linvit.data.transforms import InputSpec, build_eval_pipeline, build_train_pipeline
from linvit.data.workers import obey_parent_alone

# Whether an image that cannot be read ends the iteration or is left out of its batch.
OnBadImage = Literal["stop", "skip"]


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


class Loader:
    """Batches of one epoch at a time; iterate over it, or over `iter_from` to start in the middle.

    What a sample looks like depends on the seed, the epoch and its index alone. Only one iteration at a time.

    Attributes:
        batch_size: images in a batch of this process.
        num_images: images that this process sees in an epoch.
        class_names: name of every label.
    """

    def __init__(
        self,
        dataset: ImageSet,
        pipelines: Mapping[Size, A.Compose],
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
    ) -> None:
        self.batch_size = sampler.batch_size
        self.num_images = sampler.num_drawn
        self.class_names = dataset.class_names
        self._spec = spec
        self._device = torch.device(device)
        self._channels_last = channels_last
        self._dtype = dtype
        self._keys = _Keys(sampler)
        self._loader: DataLoader[Any] = DataLoader(
            _Samples(dataset, pipelines, tuple(epoch_sizes) or (spec.size,), seed, on_bad_image),
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=_as_is,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            # Each iteration draws a number for the workers, which nothing here uses: not from torch's own generator.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._keys.sampler)

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
        for item in self._loader:
            if isinstance(item, _Failure):
                raise ValueError(item.message)
            images = normalize(
                item.images.to(self._device, non_blocking=True),
                self._spec,
                dtype=self._dtype,
                channels_last=self._channels_last,
            )
            labels = item.labels.to(self._device, non_blocking=True)
            yield Batch(images, labels, item.indices, tuple(item.unreadable))


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
) -> Loader:
    """Shuffled and augmented batches of equal size; what is left of an epoch after the last whole batch is not used.

    Args:
        sampling: every image once an epoch, or every class equally often.
        repeats: show each image so often in an epoch, and fewer of them.
        epoch_sizes: (height, width) of the images in each epoch, the last also after it; default `spec.size`.
        on_bad_image: whether an image that cannot be read ends the iteration or is left out of its batch.

    Raises:
        ValueError: where the images do not fill one batch, or for an `aug_file` that cannot be used.
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
) -> Loader:
    """Every image exactly once over all ranks, in order, without padding: the last batch may be smaller.

    With `on_bad_image="skip"` a batch names the images that it lacks because they cannot be read.
    """
    sampler = EvalSampler(len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
    return Loader(
        dataset,
        {spec.size: build_eval_pipeline(spec)},
        spec,
        sampler,
        seed=0,
        workers=workers,
        device=device,
        pin_memory=pin_memory,
        channels_last=channels_last,
        dtype=dtype,
        on_bad_image=on_bad_image,
    )


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


class _RawBatch(NamedTuple):
    """What a worker sends: images (B, H, W, 3) uint8, labels (B,) and indices (B,) int64, what it left out."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    unreadable: tuple[int, ...]


@dataclass(frozen=True)
class _Failure:
    """Sent in place of a batch, since an exception would arrive as a worker's traceback."""

    message: str


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


class _Samples(Dataset[Any]):
    """Reads and augments whole batches."""

    def __init__(
        self,
        dataset: ImageSet,
        pipelines: Mapping[Size, A.Compose],
        epoch_sizes: Sequence[Size],
        seed: int,
        on_bad_image: OnBadImage,
    ) -> None:
        self.dataset = dataset
        self.pipelines = pipelines
        self.epoch_sizes = epoch_sizes
        self.seed = seed
        self.on_bad_image = on_bad_image

    def __getitems__(self, keys: list[SampleKey]) -> _RawBatch | _Failure:
        size = self._size_in(keys[0].epoch)
        images = torch.empty((len(keys), *size, 3), dtype=torch.uint8)
        if get_worker_info() is not None:
            # Filled where the main process will read it, instead of copied there when sent.
            images.share_memory_()
        pixels = images.numpy()
        indices: list[int] = []
        unreadable: list[int] = []
        try:
            for key in keys:
                try:
                    image = self.dataset.read(key.image)
                except UnreadableImage:
                    if self.on_bad_image == "stop":
                        raise
                    unreadable.append(key.image)
                    continue
                pixels[len(indices)] = self._augmented(image, key, self.pipelines[size])
                indices.append(key.image)
        except ValueError as error:
            return _Failure(str(error))
        labels = torch.tensor([self.dataset.label(index) for index in indices], dtype=torch.int64)
        return _RawBatch(images[: len(indices)], labels, torch.tensor(indices, dtype=torch.int64), tuple(unreadable))

    def _size_in(self, epoch: int) -> Size:
        """Of the images; a function of the epoch alone, because workers outlive epochs and read ahead."""
        return self.epoch_sizes[min(epoch, len(self.epoch_sizes) - 1)]

    def _augmented(self, image: np.ndarray, key: SampleKey, pipeline: A.Compose) -> np.ndarray:
        pipeline.set_random_state(*sample_generators(self.seed, *key))
        try:
            image = pipeline(image=image)["image"]
            check_image(image)
        except Exception as error:
            # A user's own pipeline may raise anything.
            path = self.dataset.path(key.image)
            raise ValueError(f"{path}: the augmentation fails: {type(error).__name__}: {error}") from error
        return image


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    obey_parent_alone()
    # Workers are the parallelism; more threads in each would fight over the same cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
