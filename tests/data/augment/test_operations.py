"""Operations equal Pillow's, as timm calls them."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP
from timm.data.auto_augment import gaussian_blur as timm_gaussian_blur

from linvit.data.augment.operations import GEOMETRIC, OPERATIONS, posterize

Smooth = Callable[..., np.ndarray]
FILL = (124, 116, 104)

# Arguments to test, and the tolerance on noise in grey levels.
POINTWISE: dict[str, tuple[list[float | None], int]] = {
    "AutoContrast": ([None], 0),
    "Equalize": ([None], 0),
    "Invert": ([None], 0),
    "Posterize": ([1, 4, 7, 8], 0),
    "Solarize": ([0, 1, 128, 256], 0),
    "SolarizeAdd": ([0, 55, 128], 0),
    "Contrast": ([0.1, 0.7, 1.0, 1.9], 0),
    "Brightness": ([0.1, 0.7, 1.0, 1.9], 0),
    "Color": ([0.1, 0.7, 1.0, 1.9], 2),
    "Sharpness": ([0.1, 0.7, 1.0, 1.9], 1),
    "Desaturate": ([0.5, 0.8, 1.0], 2),
}
GEOMETRIC_ARGUMENTS: dict[str, list[float]] = {
    "Rotate": [-30.0, 12.3],
    "ShearX": [-0.3, 0.2],
    "ShearY": [-0.3, 0.2],
    "TranslateX": [10.0, -7.5],
    "TranslateY": [10.0, -7.5],
    "TranslateXRel": [0.45, -0.2],
    "TranslateYRel": [0.45, -0.2],
}


def images(smooth_image: Smooth) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    return {
        "smooth": smooth_image(61, 83),
        "noise": noise,
        "dark": noise // 4 + 10,
        "flat": np.full((61, 83, 3), (10, 200, 90), np.uint8),
        "two levels": np.where(noise > 250, 255, 0).astype(np.uint8),
        "tiny": noise[:4, :3].copy(),
    }


def test_every_operation_is_tested() -> None:
    assert {*POINTWISE, *GEOMETRIC_ARGUMENTS} | {"GaussianBlur"} == {
        name.removesuffix("Increasing").removesuffix("Original").removesuffix("Rand") for name in OPERATIONS
    }
    assert set(OPERATIONS) == set(NAME_TO_OP)
    assert set(GEOMETRIC_ARGUMENTS) == GEOMETRIC
    # Variants differ only in how a magnitude becomes the argument.
    assert all(
        OPERATIONS[name] is OPERATIONS[name.removesuffix("Increasing").removesuffix("Original").removesuffix("Rand")]
        for name in OPERATIONS
    )


@pytest.mark.parametrize("name", POINTWISE)
def test_pixelwise_operations_equal_pillow(name: str, smooth_image: Smooth) -> None:
    arguments, tolerance = POINTWISE[name]
    for argument in arguments:
        given = () if argument is None else (argument,)
        for kind, image in images(smooth_image).items():
            before = image.copy()
            expected = np.asarray(NAME_TO_OP[name](Image.fromarray(image), *given)).astype(int)
            result = OPERATIONS[name](image, *given)
            assert result.dtype == np.uint8
            assert np.abs(result - expected).max() <= tolerance, (kind, argument)
            assert np.array_equal(image, before), "the input was changed"


@pytest.mark.parametrize("name", GEOMETRIC_ARGUMENTS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_geometric_operations_equal_pillow(name: str, interpolation: str, smooth_image: Smooth) -> None:
    image = smooth_image(121, 163)
    resample = Image.Resampling[interpolation.upper()]
    for argument in GEOMETRIC_ARGUMENTS[name]:
        expected = np.asarray(NAME_TO_OP[name](Image.fromarray(image), argument, fillcolor=FILL, resample=resample))
        result = OPERATIONS[name](image, argument, interpolation, FILL)
        # The libraries blend differently within two pixels of the boundary between image and fill.
        white = Image.new("L", (163, 121), 255)
        covered = np.asarray(NAME_TO_OP[name](white, argument, fillcolor=0, resample=Image.Resampling.NEAREST))
        border = np.ones((5, 5), np.uint8)
        inside = cv2.erode(covered, border, borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
        outside = cv2.dilate(covered, border) == 0
        assert inside.mean() > 0.4
        assert outside.any()
        assert np.abs(result.astype(int) - expected)[inside].max() <= 3, argument
        assert (result[outside] == FILL).all(), argument


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_pillow_on_a_smooth_image(sigma: float, smooth_image: Smooth) -> None:
    image = smooth_image(61, 83)
    expected = np.asarray(timm_gaussian_blur(Image.fromarray(image), sigma)).astype(int)
    # Pillow and OpenCV extend the border differently.
    difference = np.abs(OPERATIONS["GaussianBlur"](image, sigma) - expected)[6:-6, 6:-6]
    assert difference.max() <= 2


def test_blur_spreads_a_point_as_a_gaussian() -> None:
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = 255
    sharp = OPERATIONS["GaussianBlur"](image, 0.7)
    wide = OPERATIONS["GaussianBlur"](image, 2.0)
    # A Gaussian's peak is 1 / (2 pi sigma^2).
    assert sharp[20, 20, 0] == pytest.approx(255 / (2 * np.pi * 0.7**2), abs=4)
    assert wide[20, 20, 0] == pytest.approx(255 / (2 * np.pi * 2.0**2), abs=1)


def test_posterize_to_no_bits_is_black(smooth_image: Smooth) -> None:
    # timm reaches this at magnitude 10 with `inc1`, where current Pillow raises an error.
    assert not posterize(smooth_image(20, 20), 0).any()
