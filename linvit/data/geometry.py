"""Crops and resizes with timm's geometry, as albumentations transforms.

A crop is planned from the size in an image's header, before the image is decoded. A JPEG of which only a much smaller
image is needed can then be decoded at a reduced size.
"""

import math
import random
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import albumentations as A
import cv2
import numpy as np
from albumentations.core.transforms_interface import BaseTransformInitSchema

from linvit.data.decode import Reduction, resize, resize_part

Size = tuple[int, int]
Fill = tuple[int, int, int] | Literal["reflect"]

# A window decoded at a reduced size has at least this many times the height and width that it is resized to.
_MIN_OVERSAMPLING = 2
# Up to this many times the pixels of the result, the full window is resized: torch is faster than Pillow.
_MAX_WASTE = 8


@dataclass(frozen=True)
class CropPlan:
    """A crop of an image: a window, which is resized, and a part of the resized window.

    Attributes:
        shape: (height, width) of the full image.
        window: top, left, height and width in the image.
        resized: (height, width) that the window is resized to, by `interpolation`.
        offset: (top, left) of the result in the resized window. The result may extend beyond the window; the pixels
            outside are `fill`.
        size: (height, width) of the result.
    """

    shape: Size
    window: tuple[int, int, int, int]
    resized: Size
    interpolation: str
    offset: Size
    size: Size
    fill: Fill = (0, 0, 0)

    @cached_property
    def reduction(self) -> Reduction:
        """Largest factor by which the image may be shrunk first, so that the window keeps twice the resized size.

        Resizing the reduced window then gives the same pixels to about one grey level. "nearest" copies pixels
        unchanged, so it allows no reduction.
        """
        if self.interpolation == "nearest":
            return 1
        spare = min(length / target for length, target in zip(self.window[2:], self.resized)) / _MIN_OVERSAMPLING
        reductions: tuple[Reduction, ...] = (8, 4, 2)
        return next((reduction for reduction in reductions if reduction <= spare), 1)

    @property
    def reduced_shape(self) -> Size:
        """(height, width) of the full image after the reduction."""
        height, width = (-(-length // self.reduction) for length in self.shape)
        return height, width

    def aligned(self) -> "CropPlan":
        """The plan with its window moved to pixel edges of the reduced image, which a random window may do freely."""
        (top, bottom), (left, right) = (
            (first * self.reduction, min(last * self.reduction, length))
            for (first, last), length in zip(self._edges(self.reduction), self.shape)
        )
        return replace(self, window=(top, left, bottom - top, right - left))

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Crop an image (H, W, 3) of `shape`, or the same image reduced; returns (*size, 3), never a view."""
        (top, bottom), (left, right) = self._edges(1 if image.shape[:2] == self.shape else self.reduction)
        window = image[top:bottom, left:right]
        kept = [_kept(*axis) for axis in zip(self.resized, self.offset, self.size)]
        (part_top, height), (part_left, width) = kept
        # A very long image would be resized to thousands of times the pixels of the result.
        if math.prod(self.resized) > _MAX_WASTE * height * width:
            part = resize_part(window, *self.resized, self.interpolation, (part_top, part_left, height, width))
        else:
            part = resize(window, *self.resized, self.interpolation)[part_top:, part_left:][:height, :width]
        top, left = self.offset[0] - part_top, self.offset[1] - part_left
        return crop_or_pad(part, top, left, self.size, fill=self.fill)

    def _edges(self, reduction: int) -> list[tuple[int, int]]:
        """(top, bottom) and (left, right) of the window in the reduced image, rounded to whole pixels.

        Rounding moves them by at most a quarter of a resized pixel.
        """
        return [
            (round(start / reduction), round((start + length) / reduction))
            for start, length in zip(self.window[:2], self.window[2:])
        ]


def _kept(resized: int, offset: int, size: int) -> tuple[int, int]:
    """Start and length of the part of a resized side that the result shows; all of it where the result is padded."""
    return (offset, size) if 0 <= offset <= resized - size else (0, resized)


def crop_or_pad(image: np.ndarray, top: int, left: int, size: Size, *, fill: Fill) -> np.ndarray:
    """The window of `size` (height, width) at (top, left), padded with `fill` where it extends beyond the image."""
    height, width = image.shape[:2]
    # Above, below, left and right.
    borders = max(-top, 0), max(top + size[0] - height, 0), max(-left, 0), max(left + size[1] - width, 0)
    if any(borders):
        if fill == "reflect":
            image = cv2.copyMakeBorder(image, *borders, cv2.BORDER_REFLECT_101)
        else:
            image = cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT, value=fill)
    top, left = max(top, 0), max(left, 0)
    return image[top : top + size[0], left : left + size[1]]


def centre_offset(shape: Size, size: Size) -> Size:
    """(top, left) of a window of `size` centred in an image; negative where the window is larger."""
    # As in torchvision: a crop rounds half to even, and padding puts the odd pixel at the bottom or right.
    top, left = (
        round((length - target) / 2) if length >= target else -((target - length) // 2)
        for length, target in zip(shape, size)
    )
    return top, left


class Crop(A.ImageOnlyTransform):
    """Base class of crops, which are planned from the size of an image alone, before it is decoded."""

    @abstractmethod
    def plan(self, height: int, width: int) -> CropPlan:
        """Draw a crop of an image of this size."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        return {"plan": self.plan(*params["shape"][:2])}

    def apply(self, img: np.ndarray, plan: CropPlan, **params: Any) -> np.ndarray:
        return plan.apply(img)


class EvalCrop(Crop):
    """timm's evaluation geometry: resize to `size / crop_pct`, then crop the centre of `size`.

    "center" keeps the aspect ratio and fits the shorter side, so the result is fully covered. "squash" ignores the
    aspect ratio. "border" keeps it, fits the longer side and pads with `fill`.
    """

    class InitSchema(BaseTransformInitSchema):
        size: tuple[int, int]
        crop_pct: float
        crop_mode: Literal["center", "squash", "border"]
        interpolation: str
        fill: tuple[int, int, int]

    def __init__(
        self,
        size: Size,
        crop_pct: float = 1.0,
        crop_mode: Literal["center", "squash", "border"] = "center",
        interpolation: str = "bicubic",
        fill: tuple[int, int, int] = (0, 0, 0),
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.size = size
        self.crop_pct = crop_pct
        self.crop_mode = crop_mode
        self.interpolation = interpolation
        self.fill = fill

    def plan(self, height: int, width: int) -> CropPlan:
        resized = self._resized(height, width)
        return CropPlan(
            shape=(height, width),
            window=(0, 0, height, width),
            resized=resized,
            interpolation=self.interpolation,
            offset=centre_offset(resized, self.size),
            size=self.size,
            fill=self.fill if self.crop_mode == "border" else (0, 0, 0),
        )

    def _resized(self, height: int, width: int) -> Size:
        target_height, target_width = (math.floor(length / self.crop_pct) for length in self.size)
        if self.crop_mode == "squash":
            return target_height, target_width
        if self.crop_mode == "center" and target_height == target_width:
            # torchvision rounds the longer side down; timm's own resize, used below, rounds it to the nearest.
            if height <= width:
                return target_height, int(target_height * width / height)
            return int(target_width * height / width), target_width
        ratios = height / target_height, width / target_width
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return max(round(height / ratio), 1), max(round(width / ratio), 1)


class RandomResizedCrop(Crop):
    """timm's `rrc`: a window of random area and aspect ratio, resized to `size`.

    The window covers a share of the image's area within `scale` and has an aspect ratio (width/height) within `ratio`.
    After ten windows that do not fit, the largest centred window of a permitted ratio is taken. "random" interpolation
    draws bilinear or bicubic for each image.
    """

    class InitSchema(BaseTransformInitSchema):
        size: tuple[int, int]
        scale: tuple[float, float]
        ratio: tuple[float, float]
        interpolation: str

    def __init__(
        self,
        size: Size,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = "random",
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.size = size
        self.scale = scale
        self.ratio = ratio
        self.interpolation = interpolation

    def plan(self, height: int, width: int) -> CropPlan:
        return CropPlan(
            shape=(height, width),
            window=self._draw_window(height, width),
            resized=self.size,
            interpolation=draw_interpolation(self.interpolation, self.py_random),
            offset=(0, 0),
            size=self.size,
        ).aligned()

    def _draw_window(self, height: int, width: int) -> tuple[int, int, int, int]:
        draw = self.py_random
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = draw.uniform(*self.scale) * height * width
            aspect = math.exp(draw.uniform(*log_ratio))
            crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                return (
                    draw.randint(0, height - crop_height),
                    draw.randint(0, width - crop_width),
                    crop_height,
                    crop_width,
                )
        crop_height = min(height, max(round(width / self.ratio[0]), 1))
        crop_width = min(width, max(round(height * self.ratio[1]), 1))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


class RandomKeepRatioCrop(Crop):
    """timm's `rkrc` and `rkrr`: resize and nearly keep the aspect ratio, then crop `size`, padding by reflection.

    The image is resized to cover `size`. With probability 1/2 it is enlarged by a share of area drawn from `scale`, and
    independently with probability 1/2 stretched by an aspect ratio drawn from `ratio`. The crop is taken from the
    "centre" or from a "random" place.
    """

    class InitSchema(BaseTransformInitSchema):
        size: tuple[int, int]
        scale: tuple[float, float]
        ratio: tuple[float, float]
        interpolation: str
        crop: Literal["centre", "random"]

    def __init__(
        self,
        size: Size,
        scale: tuple[float, float] = (0.8, 1.0),
        ratio: tuple[float, float] = (0.9, 1 / 0.9),
        interpolation: str = "random",
        crop: Literal["centre", "random"] = "centre",
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.size = size
        self.scale = scale
        self.ratio = ratio
        self.interpolation = interpolation
        self.crop = crop

    def plan(self, height: int, width: int) -> CropPlan:
        draw = self.py_random
        zoom = 1 / min(height / self.size[0], width / self.size[1])
        if draw.random() < 0.5:
            zoom /= math.sqrt(draw.uniform(*self.scale))
        stretch = 1.0
        if draw.random() < 0.5:
            stretch = math.sqrt(math.exp(draw.uniform(math.log(self.ratio[0]), math.log(self.ratio[1]))))
        resized = max(round(height * zoom / stretch), 1), max(round(width * zoom * stretch), 1)
        top, left = (
            draw.randint(min(0, length - target), max(0, length - target)) for length, target in zip(resized, self.size)
        )
        return CropPlan(
            shape=(height, width),
            window=(0, 0, height, width),
            resized=resized,
            interpolation=draw_interpolation(self.interpolation, draw),
            offset=(top, left) if self.crop == "random" else centre_offset(resized, self.size),
            size=self.size,
            fill="reflect",
        )


class FitShorterSide(Crop):
    """The full image, shrunk so that its shorter side is at most `side` pixels."""

    class InitSchema(BaseTransformInitSchema):
        side: int

    def __init__(self, side: int, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.side = side

    def plan(self, height: int, width: int) -> CropPlan:
        scale = min(self.side / min(height, width), 1.0)
        resized = round(height * scale), round(width * scale)
        return CropPlan(
            shape=(height, width),
            window=(0, 0, height, width),
            resized=resized,
            interpolation="bicubic",
            offset=(0, 0),
            size=resized,
        )


def draw_interpolation(interpolation: str, draw: random.Random) -> str:
    """Draw "bilinear" or "bicubic" for "random"; return any other name unchanged."""
    return draw.choice(("bilinear", "bicubic")) if interpolation == "random" else interpolation
