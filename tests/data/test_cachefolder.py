"""Which pixels are kept where, and what the user is told about it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from linvit.data.cache import ImageCache
from linvit.data.decode import UnreadableImage
from linvit.data.geometry import Crop, EvalCrop, FitShorterSide
from linvit.data.options import CacheOptions
from linvit.data.sources.folder import ImageFolder, open_folder

MakeFolder = Callable[..., Path]


@pytest.fixture
def folder(make_folder: MakeFolder) -> ImageFolder:
    return open_folder(make_folder({"train": {"a": 3, "b": 4}}), split="train")


@pytest.fixture
def options(tmp_path: Path) -> CacheOptions:
    return CacheOptions(cache="disk", cache_dir=tmp_path / "cache")


def kept_in(options: CacheOptions) -> set[str]:
    assert options.cache_dir is not None
    return {path.name for path in options.cache_dir.iterdir()}


def test_images_are_cut_and_kept(folder: ImageFolder, options: CacheOptions) -> None:
    crop = FitShorterSide(20)
    for _ in range(2):
        cache = ImageCache(options, folder, crop)
        for index in range(len(folder)):
            image = cache.read(index)
            assert image.shape == (20, 26, 3)
            assert np.array_equal(image, crop.cut(40, 52).of(folder.read(index)))
    assert len(kept_in(options)) == 1


def test_small_images_are_kept_as_they_are(folder: ImageFolder, options: CacheOptions) -> None:
    cache = ImageCache(options, folder, FitShorterSide(41))
    assert np.array_equal(cache.read(2), folder.read(2))


def test_other_pixels_have_a_folder_of_their_own(
    folder: ImageFolder, options: CacheOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops: list[Crop] = [
        FitShorterSide(20),
        FitShorterSide(21),
        EvalCrop((20, 20)),
        EvalCrop((20, 20), crop_pct=0.9),
        EvalCrop((20, 20), interpolation="bilinear"),
        EvalCrop((20, 20), crop_mode="border"),
        EvalCrop((20, 20), crop_mode="border", fill=(1, 2, 3)),
    ]
    for crop in (*crops, FitShorterSide(20)):
        ImageCache(options, folder, crop)
    assert len(kept_in(options)) == len(crops)
    # Another decoder may give other pixels.
    monkeypatch.setattr("cv2.__version__", "4.0.0")
    ImageCache(options, folder, FitShorterSide(20))
    assert len(kept_in(options)) == len(crops) + 1


def test_a_broken_image_is_named_each_time(folder: ImageFolder, options: CacheOptions) -> None:
    folder.path(1).write_bytes(b"no image")
    cache = ImageCache(options, folder, FitShorterSide(20))
    for _ in range(2):
        with pytest.raises(UnreadableImage, match=f"{folder.path(1).name}: is truncated"):
            cache.read(1)


def test_the_user_is_told_what_it_takes(folder: ImageFolder, options: CacheOptions) -> None:
    folder.path(0).write_bytes(b"no image")
    cache = ImageCache(options, folder, FitShorterSide(20))
    cache.read(3)
    line = cache.describe()
    assert f"{options.cache_dir}/train-" in line
    assert "holds 1 of 7 images" in line
    assert "GiB are free" in line
    assert cache._estimate_bytes() == 7 * 20 * 26 * 3


def test_a_folder_that_cannot_be_written_is_named(folder: ImageFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = CacheOptions(cache="disk", cache_dir=tmp_path / "file")
    with pytest.raises(OSError, match=r"cache_dir .*file: cannot be written \(.*\); set another"):
        ImageCache(options, folder, FitShorterSide(20))
