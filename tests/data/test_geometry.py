"""Crops equal timm's transforms, also when the image is decoded at a reduced size."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import (
    CenterCropOrPad,
    RandomResizedCropAndInterpolation,
    ResizeKeepRatio,
)

from linvit.data.decode import resize
from linvit.data.geometry import (
    CropPlan,
    EvalCrop,
    RandomKeepRatioCrop,
    RandomResizedCrop,
    centre_offset,
    crop_or_pad,
)
from linvit.data.sampler import sample_generators

Smooth = Callable[..., np.ndarray]


@pytest.mark.parametrize("shape", [(375, 500), (301, 200), (97, 131), (300, 45)])
@pytest.mark.parametrize("size", [(224, 224), (160, 96)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 1.1])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_evaluation_equals_timm(
    shape: tuple[int, int], size: tuple[int, int], crop_pct: float, crop_mode: str, smooth_image: Smooth
) -> None:
    image = smooth_image(*shape)
    mean = (0.485, 0.456, 0.406)
    theirs = create_transform(
        (3, *size), crop_pct=crop_pct, crop_mode=crop_mode, interpolation="bicubic", normalize=False, mean=mean
    )
    expected = theirs(Image.fromarray(image)).permute(1, 2, 0).numpy()
    crop = EvalCrop(size=size, crop_pct=crop_pct, crop_mode=crop_mode, fill=(124, 116, 104))
    result = crop(image=image)["image"]
    assert result.shape == (*size, 3)
    assert np.abs(result.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("size", [(20, 20), (31, 50), (60, 13), (70, 71)])
def test_centre_crop_or_pad_equals_timm(size: tuple[int, int], smooth_image: Smooth) -> None:
    image = smooth_image(40, 53)
    top, left = centre_offset(image.shape[:2], size)
    for fill, settings in (((7, 8, 9), {"fill": (7, 8, 9)}), ("reflect", {"padding_mode": "reflect"})):
        expected = np.asarray(CenterCropOrPad(size, **settings)(Image.fromarray(image)))
        assert np.array_equal(crop_or_pad(image, top, left, size, fill=fill), expected)


def test_a_window_partly_outside_the_image_is_padded() -> None:
    image = np.full((4, 4, 3), 200, np.uint8)
    window = crop_or_pad(image, -1, 2, (3, 4), fill=(1, 2, 3))
    assert window.shape == (3, 4, 3)
    assert (window[1:, :2] == 200).all()
    assert (window[0] == (1, 2, 3)).all()
    assert (window[:, 2:] == (1, 2, 3)).all()


def random_windows(crop: RandomResizedCrop, height: int, width: int, count: int) -> np.ndarray:
    """Top, left, height and width of random windows, (count, 4)."""
    windows = []
    for index in range(count):
        crop.set_random_state(*sample_generators(0, 0, index))
        windows.append(crop.plan(height, width).window)
    return np.array(windows)


def test_random_windows_are_distributed_as_in_timm() -> None:
    height, width, count = 300, 400, 3000
    ours = random_windows(RandomResizedCrop(size=(32, 32)), height, width, count).astype(float)
    random.seed(0)
    image = Image.new("RGB", (width, height))
    get_params = RandomResizedCropAndInterpolation.get_params
    theirs = np.array([get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)], dtype=float)
    scale = np.array([height, width, height, width])
    for moment in (np.mean, np.std):
        assert np.abs(moment(ours / scale, axis=0) - moment(theirs / scale, axis=0)).max() < 0.02
    area = ours[:, 2] * ours[:, 3] / (height * width)
    assert area.min() > 0.075
    assert area.max() <= 1.0
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


@pytest.mark.parametrize("shape", [(10, 200), (200, 10), (1, 1)])
def test_images_that_fit_no_window_are_cropped_in_the_centre(shape: tuple[int, int]) -> None:
    window = random_windows(RandomResizedCrop(size=(8, 8), scale=(1.0, 1.0)), *shape, count=1)[0]
    expected = RandomResizedCropAndInterpolation.get_params(Image.new("RGB", shape[::-1]), (1.0, 1.0), (3 / 4, 4 / 3))
    assert tuple(window) == expected


def test_the_resized_window_equals_timm(smooth_image: Smooth) -> None:
    image = smooth_image(120, 150)
    window = (10, 20, 80, 60)
    expected = Image.fromarray(image).crop((20, 10, 80, 90)).resize((64, 48), Image.Resampling.BICUBIC)
    result = plan((120, 150), window, resized=(48, 64)).apply(image)
    assert np.abs(result.astype(int) - np.asarray(expected)).max() <= 2


def test_random_interpolation_draws_both() -> None:
    crop = RandomResizedCrop(size=(8, 8))
    methods = set()
    for index in range(20):
        crop.set_random_state(*sample_generators(0, 0, index))
        methods.add(crop.plan(20, 20).interpolation)
    assert methods == {"bilinear", "bicubic"}


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_keep_ratio_crops_give_the_size(crop: str, smooth_image: Smooth) -> None:
    transform = RandomKeepRatioCrop(size=(48, 40), crop=crop)
    for index, shape in enumerate([(60, 80), (30, 20), (200, 45), (48, 40)] * 5):
        transform.set_random_state(*sample_generators(0, 0, index))
        assert transform(image=smooth_image(*shape))["image"].shape == (48, 40, 3)


def test_keep_ratio_sizes_are_distributed_as_in_timm() -> None:
    transform = RandomKeepRatioCrop(size=(48, 40))
    ours = []
    for index in range(2000):
        transform.set_random_state(*sample_generators(0, 0, index))
        ours.append(transform.plan(90, 120).resized)
    random.seed(0)
    image = Image.new("RGB", (120, 90))
    arguments = (image, (48, 40), 0.0, 0.5, (0.8, 1.0), True, 0.5, (0.9, 1 / 0.9))
    theirs = [ResizeKeepRatio.get_params(*arguments) for _ in range(2000)]
    for moment in (np.mean, np.std):
        assert np.abs(moment(ours, axis=0) - moment(theirs, axis=0)).max() < 0.2


def plan(
    shape: tuple[int, int],
    window: tuple[int, int, int, int],
    resized: tuple[int, int],
    *,
    interpolation: str = "bicubic",
) -> CropPlan:
    return CropPlan(shape, window, resized, interpolation, offset=(0, 0), size=resized)


@pytest.mark.parametrize(
    ("window", "resized", "reduction"),
    [
        # At least twice the resized height and width remain.
        ((0, 0, 400, 400), (100, 100), 2),
        ((0, 0, 399, 400), (100, 100), 1),
        ((0, 0, 400, 399), (100, 100), 1),
        ((0, 0, 800, 900), (100, 100), 4),
        ((0, 0, 799, 900), (100, 100), 2),
        ((0, 0, 1600, 1600), (100, 100), 8),
        ((0, 0, 5000, 5000), (100, 100), 8),
        # The size of the window counts, not that of the image.
        ((10, 20, 150, 150), (100, 100), 1),
        ((0, 0, 100, 100), (224, 224), 1),
    ],
)
def test_the_reduction_keeps_twice_the_resized_size(
    window: tuple[int, int, int, int], resized: tuple[int, int], reduction: int
) -> None:
    assert plan((5000, 5000), window, resized).reduction == reduction
    assert plan((5000, 5000), window, resized, interpolation="nearest").reduction == 1


def test_the_reduced_shape_is_rounded_up() -> None:
    assert plan((801, 1003), (0, 0, 801, 1003), (100, 100)).reduced_shape == (201, 251)


@pytest.mark.parametrize("reduction", [2, 4])
def test_a_window_has_the_same_place_in_a_reduced_image(reduction: int) -> None:
    # A ramp: the value of a pixel is its position.
    height, width = 480, 640
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, height)[:, None]
    ramp[..., 1] = np.linspace(0, 255, width)
    reduced = ramp.reshape(height // reduction, reduction, width // reduction, reduction, 3).mean(axis=(1, 3))
    resized = 120 // reduction
    windowed = plan((height, width), (101, 203, 260, 310), (resized, resized))
    assert windowed.reduction == reduction
    expected = resize(ramp[101:361, 203:513], resized, resized, "bicubic").astype(int)
    assert np.abs(windowed.apply(ramp) - expected).max() == 0
    assert np.abs(windowed.apply(reduced.round().astype(np.uint8)) - expected).max() <= 1 + reduction / 4


def test_an_aligned_window_is_the_same_in_a_reduced_image() -> None:
    shape = (483, 641)
    for window in ((101, 203, 260, 310), (0, 0, 483, 641), (242, 320, 241, 321)):
        plain = plan(shape, window, (40, 40))
        aligned = plain.aligned()
        assert plain.reduction in (2, 4)
        assert all(edge % plain.reduction == 0 for edge in aligned.window[:2])
        assert np.abs(np.subtract(aligned.window, window)).max() <= plain.reduction
        top, left, height, width = aligned.window
        assert top + height <= 483
        assert left + width <= 641
    assert plan(shape, (101, 203, 30, 30), (40, 40)).aligned().window == (101, 203, 30, 30)


def test_the_crop_is_not_a_view_of_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for window, size in (((0, 0, 20, 30), (20, 30)), ((2, 3, 10, 12), (10, 12)), ((0, 0, 20, 30), (8, 8))):
        result = plan((20, 30), window, size).apply(image)
        assert result.shape == (*size, 3)
        assert not np.shares_memory(result, image)
    full = plan((20, 30), (0, 0, 20, 30), (20, 30)).apply(image)
    assert np.array_equal(full, image)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(1, 900), (900, 1), (7, 501), (40, 1200), (30, 77)])
def test_a_part_equals_that_of_the_full_resize(
    shape: tuple[int, int], interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Noise shows rounding more than photographs do.
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    monkeypatch.setattr("linvit.data.geometry._MAX_WASTE", 0)
    modes = ("center", "squash", "border")
    crops = [
        *(EvalCrop((24, 40), pct, mode, interpolation) for pct in (0.875, 1.5) for mode in modes),
        *(RandomKeepRatioCrop((31, 20), interpolation=interpolation, crop=crop) for crop in ("centre", "random")),
        RandomResizedCrop((24, 24), interpolation=interpolation),
    ]
    for crop in crops:
        crop.py_random.seed(1)
        plan = crop.plan(*shape)
        (top, left), (height, width) = plan.window[:2], plan.window[2:]
        full = resize(image[top : top + height, left : left + width], *plan.resized, interpolation)
        expected = crop_or_pad(full, *plan.offset, plan.size, fill=plan.fill).astype(int)
        difference = np.abs(plan.apply(image) - expected)
        assert difference.max() <= {"nearest": 0, "bilinear": 1, "bicubic": 2}[interpolation]
        assert difference.mean() < 0.2


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)])
def test_a_very_long_image_is_not_resized_whole(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linvit.data.geometry.resize", None)
    image = np.repeat((np.arange(20_000) % 251).astype(np.uint8), 3).reshape(*shape, 3)
    for crop in (EvalCrop((224, 224), 0.9), RandomKeepRatioCrop((224, 224), interpolation="bilinear")):
        assert crop(image=image)["image"].shape == (224, 224, 3)
