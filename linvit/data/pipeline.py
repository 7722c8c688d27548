"""From an image file, or an image, to the model's input size: a crop first, then augmentation."""

import os
import random
from typing import Any

import albumentations as A
import numpy as np

from linvit.data.geometry import Crop
from linvit.data.jpeg import reducible_size
from linvit.data.read import decode_image


class Pipeline:
    """A crop, then other transforms; a user's own pipeline has no such crop and takes whole images.

    Called with an image, as albumentations' pipelines are, `pipeline(image=image)["image"]`, or with the bytes of a
    file. It comes to the same, save that a JPEG of which little more than a quarter of the pixels each way is needed
    is decoded at a reduced size: see `Cut.reduction`. Draws from the generators last set.
    """

    def __init__(self, crop: Crop | None, augment: A.Compose) -> None:
        self.crop = crop
        self.augment = augment

    @property
    def transforms(self) -> list[A.BasicTransform]:
        """All in order; `A.Compose` of them can be saved, edited and given as `aug_file`."""
        return [*([] if self.crop is None else [self.crop]), *self.augment.transforms]

    def set_random_state(self, generator: np.random.Generator, draw: random.Random) -> None:
        if self.crop is not None:
            self.crop.set_random_state(generator, draw)
        self.augment.set_random_state(generator, draw)

    def __call__(self, *, image: np.ndarray) -> dict[str, Any]:
        """{"image": …} of an image (H, W, 3) uint8, which is left as it is."""
        return self._augmented(image.copy() if self.crop is None else self.crop.cut(*image.shape[:2]).of(image))

    def read(self, data: bytes, *, name: str | os.PathLike[str]) -> np.ndarray:
        """The result for an image file's bytes; UnreadableImage, with its `name`, as from `decode_image`."""
        image = decode_image(data, name=name) if self.crop is None else _decode_cut(data, self.crop, name)
        result: np.ndarray = self._augmented(image)["image"]
        return result

    def _augmented(self, image: np.ndarray) -> dict[str, Any]:
        result: dict[str, Any] = self.augment(image=image) if self.augment.transforms else {"image": image}
        return result


def _decode_cut(data: bytes, crop: Crop, name: str | os.PathLike[str]) -> np.ndarray:
    """A crop of an image file, which is decoded no larger than the crop needs."""
    size = reducible_size(data)
    if size is not None:
        before = crop.py_random.getstate()
        cut = crop.cut(*size)
        image = decode_image(data, name=name, reduction=cut.reduction)
        if image.shape[:2] == cut.reduced_shape:
            return cut.of(image)
        # The decoder understands a damaged header otherwise, and its word counts.
        crop.py_random.setstate(before)
    image = decode_image(data, name=name)
    return crop.cut(*image.shape[:2]).of(image)
