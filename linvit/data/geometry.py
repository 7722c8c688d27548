"""Crops and resizes with timm's geometry, as albumentations transforms."""

import math
import random
from typing import Any, Literal

import albumentations as A
import cv2
import numpy as np
from albumentations.core.transforms_interface import BaseTransformInitSchema

from linvit.data.resample import resize

Size = tuple[int, int]


def crop_or_pad(
    image: np.ndarray, top: int, left: int, size: Size, *, fill: tuple[int, int, int] | Literal["reflect"]
) -> np.ndarray:
    """The window of `size` (height, width) at (top, left), which may lie partly outside of the image."""
    height, width = image.shape[:2]
    above, below = max(-top, 0), max(top + size[0] - height, 0)
    before, behind = max(-left, 0), max(left + size[1] - width, 0)
    if above or below or before or behind:
        if fill == "reflect":
            image = cv2.copyMakeBorder(image, above, below, before, behind, cv2.BORDER_REFLECT_101)
        else:
            image = cv2.copyMakeBorder(image, above, below, before, behind, cv2.BORDER_CONSTANT, value=fill)
    top, left = max(top, 0), max(left, 0)
    return image[top : top + size[0], left : left + size[1]]


def _centre_offset(length: int, target: int) -> int:
    # torchvision rounds where it crops (to even, as Python does) and pads less before than behind.
    return round((length - target) / 2) if length >= target else -((target - length) // 2)


def centre_crop_or_pad(image: np.ndarray, size: Size, *, fill: tuple[int, int, int] | Literal["reflect"]) -> np.ndarray:
    height, width = image.shape[:2]
    top, left = _centre_offset(height, size[0]), _centre_offset(width, size[1])
    return crop_or_pad(image, top, left, size, fill=fill)


class EvalCrop(A.ImageOnlyTransform):
    """timm's evaluation geometry: resize to `size / crop_pct`, then crop the centre of `size`.

    "center" keeps the aspect ratio and covers the size with the shorter side, "squash" ignores the aspect ratio,
    "border" keeps it, fits the longer side and pads with `fill`.
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

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        height, width = self._resized(img.shape[0], img.shape[1])
        fill = self.fill if self.crop_mode == "border" else (0, 0, 0)
        return centre_crop_or_pad(resize(img, height, width, self.interpolation), self.size, fill=fill)

    def _resized(self, height: int, width: int) -> Size:
        target_height, target_width = (math.floor(length / self.crop_pct) for length in self.size)
        if self.crop_mode == "squash":
            return target_height, target_width
        if self.crop_mode == "center" and target_height == target_width:
            # torchvision rounds the longer side down, timm's own resize below rounds it to the nearest.
            if height <= width:
                return target_height, int(target_height * width / height)
            return int(target_width * height / width), target_width
        ratios = height / target_height, width / target_width
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return max(round(height / ratio), 1), max(round(width / ratio), 1)


class RandomResizedCrop(A.ImageOnlyTransform):
    """timm's `rrc`: a window of random area and aspect ratio, resized to `size`.

    The window has `scale` of the image's area and an aspect ratio (width/height) within `ratio`; after ten windows
    that do not fit, the largest central one of a permitted ratio is taken. "random" interpolation draws bilinear or
    bicubic for each image.
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

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        return {
            "window": self._draw_window(height, width),
            "method": draw_interpolation(self.interpolation, self.py_random),
        }

    def apply(self, img: np.ndarray, window: tuple[int, int, int, int], method: str, **params: Any) -> np.ndarray:
        top, left, height, width = window
        return resize(img[top : top + height, left : left + width], *self.size, method)

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


class RandomKeepRatioCrop(A.ImageOnlyTransform):
    """timm's `rkrc` and `rkrr`: resize with about the aspect ratio kept, then crop `size`, padding by reflection.

    The shorter side is brought to the size; half of the images are enlarged by a share of area drawn from `scale`,
    half are stretched by an aspect ratio drawn from `ratio`. The crop lies in the "centre" or is "random".
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

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        draw = self.py_random
        height, width = params["shape"][:2]
        zoom = 1 / min(height / self.size[0], width / self.size[1])
        if draw.random() < 0.5:
            zoom /= math.sqrt(draw.uniform(*self.scale))
        stretch = 1.0
        if draw.random() < 0.5:
            stretch = math.sqrt(math.exp(draw.uniform(math.log(self.ratio[0]), math.log(self.ratio[1]))))
        resized = max(round(height * zoom / stretch), 1), max(round(width * zoom * stretch), 1)
        offset = [
            draw.randint(min(0, length - target), max(0, length - target)) for length, target in zip(resized, self.size)
        ]
        method = draw_interpolation(self.interpolation, draw)
        return {"resized": resized, "offset": offset, "method": method}

    def apply(self, img: np.ndarray, resized: Size, offset: list[int], method: str, **params: Any) -> np.ndarray:
        img = resize(img, *resized, method)
        if self.crop == "centre":
            return centre_crop_or_pad(img, self.size, fill="reflect")
        return crop_or_pad(img, offset[0], offset[1], self.size, fill="reflect")


def draw_interpolation(interpolation: str, draw: random.Random) -> str:
    return draw.choice(("bilinear", "bicubic")) if interpolation == "random" else interpolation
