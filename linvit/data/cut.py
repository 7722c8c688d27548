"""What a crop makes of an image, worked out from the image's size before it is decoded."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import cv2
import numpy as np

from linvit.data.resample import resize

Size = tuple[int, int]
Fill = tuple[int, int, int] | Literal["reflect"]
# By how much a JPEG may shrink while it is decoded.
Reduction = Literal[1, 2, 4, 8]

# How many times the resized length a window keeps when it is decoded at a reduced size.
_KEPT_DETAIL = 2


@dataclass(frozen=True)
class Cut:
    """What a crop makes of an image: a window of it, resized, and of that a part.

    Attributes:
        shape: (height, width) of the whole image.
        window: top, left, height and width in the image.
        resized: (height, width) that the window is resized to, by `interpolation`.
        offset: (top, left) in the resized window of what is kept, which may lie partly outside; there is `fill`.
        size: (height, width) of what is kept.
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
        """By how much the image may shrink first, keeping twice the pixels, each way, that the resized window has.

        Resizing what is left then gives the same to about a grey level; "nearest" takes pixels as they are.
        """
        if self.interpolation == "nearest":
            return 1
        spare = min(length / target for length, target in zip(self.window[2:], self.resized)) / _KEPT_DETAIL
        reductions: tuple[Reduction, ...] = (8, 4, 2)
        return next((reduction for reduction in reductions if reduction <= spare), 1)

    @property
    def reduced_shape(self) -> Size:
        """(height, width) of the whole image, reduced so."""
        height, width = (-(-length // self.reduction) for length in self.shape)
        return height, width

    def aligned(self) -> "Cut":
        """With the window on edges that the reduced image has, too: a random one may as well lie there."""
        (top, bottom), (left, right) = (
            (first * self.reduction, min(last * self.reduction, whole))
            for (first, last), whole in zip(self._edges(self.reduction), self.shape)
        )
        return replace(self, window=(top, left, bottom - top, right - left))

    def of(self, image: np.ndarray) -> np.ndarray:
        """The cut of an image (H, W, 3) of `shape`, or of that image reduced; (*size, 3), never a view of it."""
        (top, bottom), (left, right) = self._edges(1 if image.shape[:2] == self.shape else self.reduction)
        resized = resize(image[top:bottom, left:right], *self.resized, self.interpolation)
        return crop_or_pad(resized, *self.offset, self.size, fill=self.fill)

    def _edges(self, reduction: int) -> list[tuple[int, int]]:
        """Top and bottom, left and right of the window in the image reduced so, rounded to whole pixels.

        That moves them by a quarter of a resized pixel at most.
        """
        return [
            (round(start / reduction), round((start + length) / reduction))
            for start, length in zip(self.window[:2], self.window[2:])
        ]


def crop_or_pad(image: np.ndarray, top: int, left: int, size: Size, *, fill: Fill) -> np.ndarray:
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
