"""Where cached images lie, and how much room they take."""

import os
import shutil
from hashlib import sha256

import albumentations as A
import cv2
import numpy as np
import torch

from linvit.data.cache import PixelCache
from linvit.data.geometry import Crop
from linvit.data.imageset import ImageSet
from linvit.data.jpeg import reducible_size
from linvit.data.memoryfolder import share_memory_folder
from linvit.data.options import CacheOptions
from linvit.data.pipeline import Pipeline
from linvit.data.read import UnreadableImage, decode_image

# Another number for other pixels, or another way to keep them.
_FORMAT = 1
# The sizes of so many images tell those of all.
_SAMPLED = 32
_GIB = 2**30


class ImageCache:
    """The images of a set as a crop, which must not be random, leaves them: cut once and kept.

    Args:
        options: where they are kept; `cache` must be set.

    Raises:
        ValueError: where the system keeps no files in memory.
        OSError: where the folder cannot be written.
    """

    def __init__(self, options: CacheOptions, dataset: ImageSet, crop: Crop) -> None:
        self.crop = crop
        self._dataset = dataset
        self._pipeline = Pipeline(crop, A.Compose([]))
        name = f"{dataset.split}-{_key(dataset, crop)}".replace(os.sep, "-")
        if options.cache == "memory":
            self._pixels = PixelCache(share_memory_folder(name), len(dataset))
            return
        assert options.cache_dir is not None
        try:
            self._pixels = PixelCache(options.cache_dir / name, len(dataset))
        except OSError as error:
            raise OSError(
                f"cache_dir {options.cache_dir}: cannot be written ({error.strerror}); set another"
            ) from error

    def read(self, index: int) -> np.ndarray:
        """The image, (H, W, 3) uint8 and not to be written to; UnreadableImage, naming it, where it cannot be read."""
        path = self._dataset.path(index)
        return self._pixels.get(index, path, lambda: self._pipeline.read(self._dataset.read_bytes(index), name=path))

    def describe(self) -> str:
        """One line for the user: where the cache lies, what it holds, and the room that it takes and has."""
        free = shutil.disk_usage(self._pixels.folder).free / _GIB
        return (
            f"cache {self._pixels.folder}: holds {self._pixels.num_kept:,} of {len(self._dataset):,} images; all take "
            f"about {self._estimate_bytes() / _GIB:,.2f} GiB, {free:,.1f} GiB are free"
        )

    def _estimate_bytes(self) -> int:
        """What the images take once they are cut, from the sizes of some."""
        count = len(self._dataset)
        sizes = []
        for index in np.linspace(0, count - 1, min(_SAMPLED, count)).astype(int).tolist():
            try:
                data = self._dataset.read_bytes(index)
                shape = reducible_size(data) or decode_image(data, name=self._dataset.path(index)).shape
            except UnreadableImage:
                continue
            height, width = self.crop.cut(*shape[:2]).size
            sizes.append(3 * height * width)
        return round(count * float(np.mean(sizes))) if sizes else 0


def _key(dataset: ImageSet, crop: Crop) -> str:
    """Differs where pixels may, beside each image's file."""
    made = (_FORMAT, cv2.__version__, torch.__version__, os.path.abspath(dataset.root), len(dataset), repr(crop))
    return sha256(repr(made).encode()).hexdigest()[:16]
