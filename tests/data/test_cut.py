"""What is cut of an image, whole or decoded at a reduced size."""

import numpy as np
import pytest

from linvit.data.decode import resize
from linvit.data.geometry import Cut


def cut(shape: tuple[int, int], window: tuple[int, int, int, int], resized: tuple[int, int], **settings: str) -> Cut:
    return Cut(shape, window, resized, settings.get("interpolation", "bicubic"), offset=(0, 0), size=resized)


@pytest.mark.parametrize(
    ("window", "resized", "reduction"),
    [
        # Twice the pixels stay, each way.
        ((0, 0, 400, 400), (100, 100), 2),
        ((0, 0, 399, 400), (100, 100), 1),
        ((0, 0, 400, 399), (100, 100), 1),
        ((0, 0, 800, 900), (100, 100), 4),
        ((0, 0, 799, 900), (100, 100), 2),
        ((0, 0, 1600, 1600), (100, 100), 8),
        ((0, 0, 5000, 5000), (100, 100), 8),
        # The window counts, not the image.
        ((10, 20, 150, 150), (100, 100), 1),
        ((0, 0, 100, 100), (224, 224), 1),
    ],
)
def test_the_reduction_keeps_twice_the_pixels(
    window: tuple[int, int, int, int], resized: tuple[int, int], reduction: int
) -> None:
    assert cut((5000, 5000), window, resized).reduction == reduction
    assert cut((5000, 5000), window, resized, interpolation="nearest").reduction == 1


def test_the_reduced_shape_is_rounded_up() -> None:
    assert cut((801, 1003), (0, 0, 801, 1003), (100, 100)).reduced_shape == (201, 251)


@pytest.mark.parametrize("reduction", [2, 4])
def test_a_window_lies_in_the_same_place_of_a_reduced_image(reduction: int) -> None:
    # A ramp: where a pixel comes from is its value.
    height, width = 480, 640
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, height)[:, None]
    ramp[..., 1] = np.linspace(0, 255, width)
    reduced = ramp.reshape(height // reduction, reduction, width // reduction, reduction, 3).mean(axis=(1, 3))
    resized = 120 // reduction
    window = cut((height, width), (101, 203, 260, 310), (resized, resized))
    assert window.reduction == reduction
    expected = resize(ramp[101:361, 203:513], resized, resized, "bicubic").astype(int)
    assert np.abs(window.of(ramp) - expected).max() == 0
    assert np.abs(window.of(reduced.round().astype(np.uint8)) - expected).max() <= 1 + reduction / 4


def test_an_aligned_window_is_the_same_in_a_reduced_image() -> None:
    shape = (483, 641)
    for window in ((101, 203, 260, 310), (0, 0, 483, 641), (242, 320, 241, 321)):
        plain = cut(shape, window, (40, 40))
        aligned = plain.aligned()
        assert plain.reduction in (2, 4)
        assert all(edge % plain.reduction == 0 for edge in aligned.window[:2])
        assert np.abs(np.subtract(aligned.window, window)).max() <= plain.reduction
        top, left, height, width = aligned.window
        assert top + height <= 483
        assert left + width <= 641
    assert cut(shape, (101, 203, 30, 30), (40, 40)).aligned().window == (101, 203, 30, 30)


def test_the_cut_is_no_view_of_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for window, size in (((0, 0, 20, 30), (20, 30)), ((2, 3, 10, 12), (10, 12)), ((0, 0, 20, 30), (8, 8))):
        result = cut((20, 30), window, size).of(image)
        assert result.shape == (*size, 3)
        assert not np.shares_memory(result, image)
    whole = cut((20, 30), (0, 0, 20, 30), (20, 30)).of(image)
    assert np.array_equal(whole, image)
