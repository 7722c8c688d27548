"""Batches are the same for any number of workers and any start, complete and normalised, and errors name the image."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from jpegs import encode, photo

from linvit.data.augment.build import InputSpec, build_eval_pipeline
from linvit.data.decode import read_image
from linvit.data.loader import Batch, Loader, create_eval_loader, create_train_loader, normalize
from linvit.data.options import AugmentOptions, CacheOptions
from linvit.data.sources.folder import ImageFolder, open_folder

SPEC = InputSpec((24, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.9, "center")
AUGMENT = AugmentOptions(vflip=0.5, aa="rand-m9-mstd0.5-inc1", grayscale_prob=0.2, gaussian_blur_prob=0.3, reprob=0.5)

MakeFolder = Callable[..., Path]


@pytest.fixture
def folder(make_folder: MakeFolder) -> ImageFolder:
    return open_folder(make_folder({"train": {"a": 6, "b": 7}}), split="train")


def train_loader(folder: ImageFolder, **settings: Any) -> Loader:
    settings = {"batch_size": 4, "seed": 5, "workers": 0, "device": "cpu"} | settings
    return create_train_loader(folder, AUGMENT, SPEC, **settings)


def eval_loader(folder: ImageFolder, **settings: Any) -> Loader:
    return create_eval_loader(folder, SPEC, **({"batch_size": 4, "workers": 0, "device": "cpu"} | settings))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.indices, b.indices)


def images_by_index(batches: list[Batch]) -> dict[int, torch.Tensor]:
    return {index: image for batch in batches for index, image in zip(batch.indices.tolist(), batch.images)}


def epochs(loader: Loader) -> list[list[Batch]]:
    batches = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        batches.append(list(loader))
    return batches


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_nothing(workers: int, folder: ImageFolder) -> None:
    alone = epochs(train_loader(folder))
    loader = train_loader(folder, workers=workers)
    for expected, batches in zip(alone, epochs(loader)):
        assert_same(expected, batches)
    # The persistent workers can start an epoch in the middle.
    loader.set_epoch(1)
    assert_same(alone[1][1:], list(loader.iter_from(1)))
    # An epoch that was abandoned does not leak into the next.
    next(iter(loader))
    loader.set_epoch(0)
    assert_same(alone[0], list(loader))
    # The order and every image differ in the next epoch.
    assert not torch.equal(alone[0][0].indices, alone[1][0].indices)
    first, second = (images_by_index(batches) for batches in alone)
    assert len(first.keys() & second.keys()) > 8
    assert not any(torch.equal(first[index], second[index]) for index in first.keys() & second.keys())


def test_an_epoch_may_start_anywhere(folder: ImageFolder) -> None:
    loader = train_loader(folder)
    loader.set_epoch(3)
    full = list(loader)
    for first in range(len(loader) + 1):
        assert_same(full[first:], list(loader.iter_from(first)))


def test_a_sample_does_not_depend_on_its_batch(folder: ImageFolder) -> None:
    full = train_loader(folder, batch_size=13)
    (batch,) = full
    for small in train_loader(folder, batch_size=4):
        for image, index in zip(small.images, small.indices):
            assert torch.equal(image, batch.images[batch.indices == index][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_generator_is_not_advanced(workers: int, folder: ImageFolder) -> None:
    state = torch.get_rng_state()
    list(train_loader(folder, workers=workers))
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_complete_and_labelled(folder: ImageFolder) -> None:
    loader = train_loader(folder, workers=2)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert (loader.batch_size, loader.num_images, loader.class_names) == (4, 12, ["a", "b"])
    for batch in batches:
        assert batch.images.shape == (4, 3, 24, 32)
        assert batch.images.dtype == torch.float32
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
        assert batch.labels.tolist() == [folder.label(index) for index in batch.indices]


def test_two_ranks_share_an_epoch(folder: ImageFolder) -> None:
    ranks = [train_loader(folder, batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    seen = [[index for batch in rank for index in batch.indices.tolist()] for rank in ranks]
    assert not set(seen[0]) & set(seen[1])
    assert len({*seen[0], *seen[1]}) == 12
    (together,) = (list(train_loader(folder, batch_size=6)),)
    for step, batch in enumerate(together):
        parts = [list(rank)[step] for rank in ranks]
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_as_read(world_size: int, workers: int, folder: ImageFolder) -> None:
    pipeline = build_eval_pipeline(SPEC)
    seen = []
    for rank in range(world_size):
        loader = eval_loader(folder, workers=workers, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert sum(len(batch.indices) for batch in batches) == loader.num_images
        for batch in batches:
            for image, label, index in zip(batch.images, batch.labels, batch.indices.tolist()):
                pixels = pipeline(image=read_image(folder.path(index)))["image"]
                assert torch.equal(image, normalize(torch.from_numpy(pixels)[None], SPEC)[0])
                assert label == folder.label(index)
                seen.append(index)
    assert sorted(seen) == list(range(13))


def test_normalisation() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).repeat(1, 3, 4, 3)
    mean, std = torch.tensor(SPEC.mean).view(3, 1, 1), torch.tensor(SPEC.std).view(3, 1, 1)
    expected = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    result = normalize(pixels, SPEC)
    assert torch.equal(result, expected)
    assert result.is_contiguous()
    assert torch.equal(pixels[:, 0, 0, 0], torch.arange(256, dtype=torch.uint8))
    last = normalize(pixels, SPEC, channels_last=True)
    assert torch.equal(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(normalize(pixels, SPEC, dtype=torch.bfloat16), expected.to(torch.bfloat16))


def test_the_loader_sets_memory_layout_and_dtype(folder: ImageFolder) -> None:
    batch = next(iter(eval_loader(folder, channels_last=True, dtype=torch.float16)))
    assert batch.images.dtype == torch.float16
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_in_one_sentence(workers: int, folder: ImageFolder) -> None:
    broken = folder.path(9)
    broken.write_bytes(broken.read_bytes()[:100])
    sentence = f"{broken}: is truncated, damaged or not an image; restore or remove the file"
    # The loader gets no name: otherwise the garbage collector frees it, which waits ten seconds for the workers.
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        list(eval_loader(folder, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_may_be_left_out_and_is_listed(workers: int, folder: ImageFolder) -> None:
    full = images_by_index(list(eval_loader(folder)))
    for index in (4, 5, 6, 7, 9):
        folder.path(index).write_bytes(b"")
    batches = list(eval_loader(folder, workers=workers, on_bad_image="skip"))
    assert [batch.unreadable for batch in batches] == [(), (4, 5, 6, 7), (9,), ()]
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2, 3], [], [8, 10, 11], [12]]
    assert batches[1].images.shape == (0, 3, 24, 32)
    assert batches[1].labels.dtype == torch.int64
    for batch in batches:
        assert batch.labels.tolist() == [folder.label(index) for index in batch.indices]
        for index, image in zip(batch.indices.tolist(), batch.images):
            assert torch.equal(image, full[index])


def test_leaving_an_image_out_does_not_change_the_others(folder: ImageFolder) -> None:
    full = images_by_index(list(train_loader(folder)))
    lost = next(iter(full))
    folder.path(lost).unlink()
    batches = list(train_loader(folder, on_bad_image="skip"))
    found = images_by_index(batches)
    assert found.keys() == full.keys() - {lost}
    assert all(torch.equal(image, full[index]) for index, image in found.items())
    assert batches[0].unreadable == (lost,)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_augmentation_names_the_image(workers: int, make_folder: MakeFolder) -> None:
    data = make_folder({"train": {"a": 4}})
    own = data / "own.yaml"
    A.save(A.Compose([A.RandomCrop(height=64, width=64)]), own, data_format="yaml")
    folder = open_folder(data, split="train")
    augment = AugmentOptions(aug_file=own)
    settings: dict[str, Any] = {"batch_size": 2, "seed": 0, "workers": workers, "device": "cpu"}
    # The images are valid, so none is left out.
    loader = create_train_loader(folder, augment, SPEC, on_bad_image="skip", **settings)
    with pytest.raises(ValueError, match=r"\.png: the augmentation failed: CropSizeError: "):
        list(loader)


def test_fewer_images_than_a_batch_are_refused(folder: ImageFolder) -> None:
    with pytest.raises(ValueError, match="batch_size 14 needs 14 training images, but there are 13"):
        train_loader(folder, batch_size=14)


def test_evaluation_accepts_fewer_images_than_a_batch(folder: ImageFolder) -> None:
    (batch,) = eval_loader(folder, batch_size=64)
    assert len(batch.images) == 13


def test_training_without_augmentation_leaves_the_images_unchanged(folder: ImageFolder) -> None:
    spec = InputSpec((40, 52), SPEC.mean, SPEC.std, "bicubic", 1.0, "center")
    loader = create_train_loader(
        folder, AugmentOptions(no_aug=True), spec, batch_size=4, seed=0, workers=0, device="cpu"
    )
    for batch in loader:
        pixels = np.stack([folder[index][0] for index in batch.indices.tolist()])
        assert torch.equal(batch.images, normalize(torch.from_numpy(pixels), spec))


def caching(tmp_path: Path, **settings: Any) -> CacheOptions:
    return CacheOptions(cache="disk", cache_dir=tmp_path / "cache", **settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_are_the_same_in_every_epoch(workers: int, folder: ImageFolder, tmp_path: Path) -> None:
    # The images are larger than 32 pixels, so their cached pixels differ from those without a cache.
    cached = caching(tmp_path, cache_size=32)
    expected = epochs(train_loader(folder, caching=caching(tmp_path / "other", cache_size=32)))
    for _ in range(2):
        # The second run finds all images in the cache.
        for batches, full in zip(epochs(train_loader(folder, workers=workers, caching=cached)), expected):
            assert_same(batches, full)
    loader = train_loader(folder, caching=cached)
    loader.set_epoch(1)
    assert_same(list(loader.iter_from(2)), expected[1][2:])
    assert loader.cache is not None
    assert "holds 13 of 13 images" in loader.cache.describe()
    plain = epochs(train_loader(folder))
    assert not torch.equal(plain[0][0].images, expected[0][0].images)


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_evaluation_equals_uncached_evaluation(workers: int, folder: ImageFolder, tmp_path: Path) -> None:
    expected = list(eval_loader(folder))
    for _ in range(2):
        loader = eval_loader(folder, workers=workers, caching=caching(tmp_path))
        for _ in range(2):
            assert_same(list(loader), expected)


def test_cache_size_must_not_be_below_the_input(folder: ImageFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cache_size 31 is below the input's 32 pixels; set at least 32"):
        train_loader(folder, caching=caching(tmp_path, cache_size=31))
    assert train_loader(folder, caching=CacheOptions()).cache is None


def test_augmentation_does_not_modify_cached_images(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = make_folder({"train": {"a": 4}}, height=24, width=32)
    folder = open_folder(data, split="train")
    # Erasing writes into the image; at this size the crop before it changes nothing.
    augment = AugmentOptions(scale=(1, 1), ratio=(4 / 3, 4 / 3), hflip=0, color_jitter=None, reprob=1.0, remode="rand")
    settings: dict[str, Any] = {"batch_size": 4, "seed": 0, "workers": 0, "device": "cpu"}
    loader = create_train_loader(folder, augment, SPEC, caching=caching(tmp_path), **settings)
    plain = create_train_loader(folder, augment, SPEC, **settings)
    for batches, expected in zip(epochs(loader), epochs(plain)):
        assert_same(batches, expected)


def test_large_photographs_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    for number in range(8):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(200 + 8 * number, 304), orientation=6 if number % 3 else None))
    folder = open_folder(tmp_path, split="train")
    for make in (train_loader, eval_loader):
        expected = epochs(make(folder))
        for batches, full in zip(epochs(make(folder, workers=2)), expected):
            assert_same(batches, full)


def test_batches_that_are_not_released_keep_their_pixels(folder: ImageFolder) -> None:
    # Raw batches of the workers, whose memory must not be reused before it is released.
    expected = [batch.images.clone() for batch in eval_loader(folder, batch_size=1)._loader]
    for workers in (0, 1):
        raw = list(eval_loader(folder, batch_size=1, workers=workers)._loader)
        assert all(torch.equal(batch.images, images) for batch, images in zip(raw, expected))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_reach_the_device(folder: ImageFolder) -> None:
    host = list(eval_loader(folder))
    for batch, expected in zip(eval_loader(folder, device="cuda", workers=2, pin_memory=True), host):
        assert batch.images.is_cuda
        assert batch.labels.is_cuda
        assert not batch.indices.is_cuda
        torch.testing.assert_close(batch.images.cpu(), expected.images, rtol=0, atol=1e-6)
        assert torch.equal(batch.indices, expected.indices)
