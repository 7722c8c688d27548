"""Which images to predict on: files, folders, patterns, lists, and images that are in memory already.

A sample of a folder's images, as a model takes them.
"""

import codecs
import glob
import os
import random
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from linvit.data.augment.build import InputSpec, build_eval_pipeline
from linvit.data.decode import EXTENSIONS, read_file, read_image
from linvit.data.loader import normalize
from linvit.data.sources.base import ImageSet, PackedStrings
from linvit.data.sources.folder import is_folder, list_folder

# A path or pattern, an image as (H, W, 3) uint8 RGB, or one of Pillow's.
Input: TypeAlias = str | os.PathLike[str] | np.ndarray | Image.Image


class LooseImages(ImageSet):
    """Images without labels, each a file's path or (H, W, 3) uint8 RGB."""

    def __init__(self, images: PackedStrings | Sequence[str | np.ndarray]) -> None:
        super().__init__(Path(), split="", class_names=(), labels=np.zeros(len(images), np.int64))
        self._images = images

    def name(self, index: int) -> str | None:
        """The file's path as it was given; None for an image that comes from none."""
        image = self._images[index]
        return image if isinstance(image, str) else None

    def path(self, index: int) -> Path:
        return Path(self.name(index) or f"image {index}")

    def read_bytes(self, index: int) -> bytes:
        image = self._images[index]
        if isinstance(image, str):
            return read_file(self.path(index))
        # A PPM file, which holds the very pixels.
        return b"P6 %d %d 255\n" % (image.shape[1], image.shape[0]) + image.tobytes()


def find_images(inputs: Iterable[Input]) -> LooseImages:
    """The images that the inputs stand for, in their order; a path that does not exist is one that cannot be read.

    Raises ValueError for a folder without images, and for what is no image.
    """
    images: list[str | np.ndarray] = []
    for image in inputs:
        if isinstance(image, str | os.PathLike):
            images += expand(os.fspath(image), missing="keep")
        else:
            images.append(_pixels(image))
    return LooseImages(images)


def expand(path: str, *, missing: Literal["refuse", "keep"]) -> Iterator[str]:
    """The image files that a file, a folder or a pattern stands for.

    A folder stands for the files below it, at any depth, whose extension is an image's; hidden ones are passed over.
    Within each folder names go by natural order (2.jpg before 10.jpg), folders in their place among the files. A
    pattern, as `scans/**/*.png`, stands for the paths that match it, in the same order.

    Args:
        missing: whether what does not exist is an error or stands for itself.

    Raises ValueError for a folder without images.
    """
    if os.path.isdir(path):
        images = _images_below(path, ())
        first = next(images, None)
        if first is None:
            raise ValueError(f"{path}: holds no images (looked for {' '.join(EXTENSIONS)})")
        yield first
        yield from images
        return
    matches = [path] if os.path.exists(path) else sorted(glob.iglob(path, recursive=True), key=natural_key)
    if not matches and missing == "refuse":
        raise ValueError(f"{path}: there is no such file or folder, and nothing matches it; correct the path")
    for match in matches or [path]:
        if os.path.isdir(match):
            yield from _images_below(match, ())
        else:
            yield match


def read_list(lines: Iterable[bytes]) -> Iterator[str]:
    """Paths of image files from a list with one a line; empty lines are passed over."""
    for line in lines:
        path = line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
        if path:
            yield os.fsdecode(path)


def natural_key(path: str) -> tuple[list[Any], str]:
    """Sorts paths name by name, numbers in names by their value, the rest as text."""
    return [[_numbers_apart(part) for part in os.path.splitext(name)] for name in path.split(os.sep)], path


def _numbers_apart(text: str) -> list[str | int]:
    # Text and numbers alternate, so that only like is compared with like.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def _images_below(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    # A link to a folder above would lead round in circles.
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in sorted(list_folder(folder), key=lambda entry: natural_key(entry.name)):
        if entry.name.startswith("."):
            continue
        if is_folder(entry):
            yield from _images_below(entry.path, (*above, real))
        elif entry.name.lower().endswith(EXTENSIONS):
            yield entry.path


def _pixels(image: np.ndarray | Image.Image) -> np.ndarray:
    if isinstance(image, Image.Image):
        # As files are read: upright, colours under an alpha channel kept.
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"{kind} is no image: give a path, a PIL image or an array (height, width, 3) uint8 RGB")
    return image


# Batches being read at once; each takes memory until its turn comes.
_MOST_THREADS = 8


def sample_paths(folder: Path, *, count: int, seed: int) -> list[str]:
    """`count` image files below a folder at any depth, drawn by `seed`, or all where there are fewer.

    Raises ValueError where there is no such folder, or no image in it.
    """
    paths = list(expand(str(folder), missing="refuse"))
    return random.Random(seed).sample(paths, min(count, len(paths)))


def load_images(paths: Sequence[str], spec: InputSpec) -> Tensor:
    """The images as evaluation prepares them: (B, 3, height, width), normalised.

    Raises UnreadableImage, naming the first that cannot be read.
    """
    pipeline = build_eval_pipeline(spec)
    images = [torch.from_numpy(pipeline(image=read_image(path))["image"]) for path in paths]
    return normalize(torch.stack(images), spec)


def load_batches(paths: Sequence[str], spec: InputSpec, *, batch_size: int) -> Iterator[Tensor]:
    """`load_images` of so many at once, in order, read ahead by a few threads."""
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Tensor]] = deque()
        for first in range(0, len(paths), batch_size):
            ahead.append(pool.submit(load_images, paths[first : first + batch_size], spec))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
