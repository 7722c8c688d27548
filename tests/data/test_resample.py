"""Resizing equals Pillow's, shrinking without aliasing."""

import numpy as np
import pytest
from PIL import Image

from linvit.data.decode import resize

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("target", [(32, 32), (23, 71), (97, 131), (200, 150)])
def test_equals_pillow_on_noise(interpolation: str, target: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize(target[::-1], PILLOW[interpolation]))
    resized = resize(image, *target, interpolation)
    assert resized.dtype == np.uint8
    assert resized.flags.c_contiguous
    assert np.abs(resized.astype(int) - expected).max() <= 2


def test_fine_stripes_shrink_to_grey() -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    for interpolation in PILLOW:
        # The two columns at each border see fewer stripes.
        assert np.abs(resize(stripes, 48, 48, interpolation)[:, 2:-2].astype(int) - 127).max() < 25


def test_a_window_of_an_image_is_resized_as_its_copy() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    window = image[7:50, 11:70]
    assert np.array_equal(resize(window, 32, 32, "bicubic"), resize(window.copy(), 32, 32, "bicubic"))


def test_nearest_takes_pixels_as_they_are() -> None:
    image = np.random.default_rng(0).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    assert np.array_equal(resize(image, 20, 20, "nearest"), image.repeat(2, axis=0).repeat(2, axis=1))


def test_the_same_size_is_left_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    assert np.array_equal(resize(image, 10, 12, "bicubic"), image)
