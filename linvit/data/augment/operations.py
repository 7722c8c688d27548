"""The image operations of RandAugment and similar policies, equal to Pillow's, which timm uses, within rounding.

Every operation takes and returns (H, W, 3) uint8. Geometric operations also take an interpolation, "bilinear" or
"bicubic", and `fill`, the colour of the pixels outside the image.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

Color = tuple[int, int, int]
_CV2_INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_GREY_LEVELS = np.arange(256)
# Pillow's SMOOTH filter, which gives the degenerate image of its sharpness enhancer.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13


def _apply_table(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Map every pixel by a table of 256 grey levels, or by one table per channel, (3, 256)."""
    levels = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(image, levels if levels.ndim == 1 else np.ascontiguousarray(levels.T)[None])


def _channel_histograms(image: np.ndarray) -> np.ndarray:
    """Counts of every grey level, (3, 256)."""
    return np.stack([cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(3)]).astype(np.int64)


def _blend(degenerate: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """Blend as Pillow's enhancers do: factor 0 is the degenerate image, 1 the image, and above 1 exaggerates."""
    return cv2.addWeighted(image, factor, degenerate, 1.0 - factor, 0.0)


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Stretch every channel to the full range."""
    tables = np.tile(_GREY_LEVELS, (3, 1))
    for table, counts in zip(tables, _channel_histograms(image)):
        present = np.flatnonzero(counts)
        low, high = int(present[0]), int(present[-1])
        if high > low:
            scale = 255.0 / (high - low)
            table[:] = np.trunc(_GREY_LEVELS * scale - low * scale)
    return _apply_table(image, tables)


def equalize(image: np.ndarray) -> np.ndarray:
    """Flatten the histogram of every channel."""
    tables = np.tile(_GREY_LEVELS, (3, 1))
    for table, counts in zip(tables, _channel_histograms(image)):
        present = counts[counts > 0]
        step = (int(counts.sum()) - int(present[-1])) // 255
        if len(present) > 1 and step > 0:
            table[:] = (step // 2 + np.cumsum(counts) - counts) // step
    return _apply_table(image, tables)


def invert(image: np.ndarray) -> np.ndarray:
    return cv2.bitwise_not(image)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keep the upper `bits` bits."""
    return image if bits >= 8 else _apply_table(image, _GREY_LEVELS & ~(2 ** (8 - bits) - 1))


def solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    """Invert the grey levels from `threshold` up."""
    return _apply_table(image, np.where(threshold > _GREY_LEVELS, _GREY_LEVELS, 255 - _GREY_LEVELS))


def solarize_add(image: np.ndarray, addend: int) -> np.ndarray:
    """Add `addend` to the grey levels below 128."""
    return _apply_table(image, np.where(_GREY_LEVELS < 128, _GREY_LEVELS + addend, _GREY_LEVELS))


def adjust_color(image: np.ndarray, factor: float) -> np.ndarray:
    return _blend(cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), image, factor)


def _apply_blend_from(level: int, image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with an image of one grey level, bit for bit as Pillow: in float32, rounded towards zero."""
    table = np.float32(level) + np.float32(factor) * (_GREY_LEVELS - level).astype(np.float32)
    return _apply_table(image, np.trunc(table))


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    return _apply_blend_from(int(_grey(image).mean() + 0.5), image, factor)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return _apply_blend_from(0, image, factor)


def adjust_sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    smooth = image.copy()
    # Border pixels lack a full neighbourhood and stay unchanged.
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, _SMOOTH)[1:-1, 1:-1]
    return _blend(smooth, image, factor)


def desaturate(image: np.ndarray, amount: float) -> np.ndarray:
    """Blend with the grey image by `amount`, from 0 to 1."""
    return adjust_color(image, min(1.0, max(0.0, 1.0 - amount)))


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)


def _transform(image: np.ndarray, matrix: np.ndarray, interpolation: str, fill: Color) -> np.ndarray:
    """Warp by `matrix` (2, 3), which maps output to input positions; pixel centres are at half-integers."""
    shifted = matrix.copy()
    shifted[:, 2] += 0.5 * (matrix[:, 0] + matrix[:, 1]) - 0.5
    height, width = image.shape[:2]
    flags = _CV2_INTERPOLATION[interpolation] | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(
        image, shifted, (width, height), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=fill
    )


def rotate(image: np.ndarray, degrees: float, interpolation: str, fill: Color) -> np.ndarray:
    """Rotate counter-clockwise about the centre."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.shape[1] / 2, image.shape[0] / 2
    matrix = np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])
    return _transform(image, matrix, interpolation, fill)


def shear_x(image: np.ndarray, factor: float, interpolation: str, fill: Color) -> np.ndarray:
    return _transform(image, np.array([[1.0, factor, 0.0], [0.0, 1.0, 0.0]]), interpolation, fill)


def shear_y(image: np.ndarray, factor: float, interpolation: str, fill: Color) -> np.ndarray:
    return _transform(image, np.array([[1.0, 0.0, 0.0], [factor, 1.0, 0.0]]), interpolation, fill)


def translate_x(image: np.ndarray, pixels: float, interpolation: str, fill: Color) -> np.ndarray:
    return _transform(image, np.array([[1.0, 0.0, pixels], [0.0, 1.0, 0.0]]), interpolation, fill)


def translate_y(image: np.ndarray, pixels: float, interpolation: str, fill: Color) -> np.ndarray:
    return _transform(image, np.array([[1.0, 0.0, 0.0], [0.0, 1.0, pixels]]), interpolation, fill)


def translate_x_rel(image: np.ndarray, share: float, interpolation: str, fill: Color) -> np.ndarray:
    return translate_x(image, share * image.shape[1], interpolation, fill)


def translate_y_rel(image: np.ndarray, share: float, interpolation: str, fill: Color) -> np.ndarray:
    return translate_y(image, share * image.shape[0], interpolation, fill)


# By timm's names. Suffixes such as "Increasing" only change how a magnitude becomes the argument (see policy.py).
OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Rotate": rotate,
    "Posterize": posterize,
    "PosterizeIncreasing": posterize,
    "PosterizeOriginal": posterize,
    "Solarize": solarize,
    "SolarizeIncreasing": solarize,
    "SolarizeAdd": solarize_add,
    "Color": adjust_color,
    "ColorIncreasing": adjust_color,
    "Contrast": adjust_contrast,
    "ContrastIncreasing": adjust_contrast,
    "Brightness": adjust_brightness,
    "BrightnessIncreasing": adjust_brightness,
    "Sharpness": adjust_sharpness,
    "SharpnessIncreasing": adjust_sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "TranslateXRel": translate_x_rel,
    "TranslateYRel": translate_y_rel,
    "Desaturate": desaturate,
    "GaussianBlur": gaussian_blur,
    "GaussianBlurRand": gaussian_blur,
}
# Operations that move pixels; they also take an interpolation and a fill.
GEOMETRIC = frozenset(("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"))
