"""Images without labels: find them by path, folder, pattern or list, sample them, and load them as model input."""

import codecs
import glob
import os
import random
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
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
from linvit.data.sources.folder import is_first_visit, list_folder
from linvit.output.files import reason

# A path or pattern, the bytes of an image file, an image as (H, W, 3) RGB or (H, W) grey, uint8 or uint16, or a Pillow
# image.
Input: TypeAlias = str | os.PathLike[str] | bytes | np.ndarray | Image.Image

# Each thread of `load_batches` keeps a batch in memory until its turn.
_MOST_THREADS = 8


class LooseImages(ImageSet):
    """Images without labels.

    Args:
        images: the path of each image, the bytes of its file, or its pixels, (H, W, 3) RGB or (H, W) grey, uint8 or
            uint16.
    """

    def __init__(self, images: PackedStrings | Sequence[str | bytes | np.ndarray]) -> None:
        super().__init__(Path(), split="", class_names=(), labels=np.zeros(len(images), np.int64))
        self._images = images

    def name(self, index: int) -> str | None:
        """The path as given; None for an image that was given as bytes or pixels."""
        image = self._images[index]
        return image if isinstance(image, str) else None

    def path(self, index: int) -> Path:
        return Path(self.name(index) or f"image {index}")

    def read_bytes(self, index: int) -> bytes:
        image = self._images[index]
        if isinstance(image, str):
            return read_file(self.path(index))
        if isinstance(image, bytes):
            return image
        # As a PGM or PPM file, whose pixels are not compressed; 16 bits are big-endian there.
        kind = b"P5" if image.ndim == 2 else b"P6"
        highest = np.iinfo(image.dtype).max
        pixels = image.astype(image.dtype.newbyteorder(">"))
        return b"%b %d %d %d\n" % (kind, image.shape[1], image.shape[0], highest) + pixels.tobytes()


def find_images(inputs: Iterable[Input]) -> LooseImages:
    """All images that the inputs name or contain, in order; see `iterate_images`."""
    return LooseImages(list(iterate_images(inputs)))


def iterate_images(inputs: Iterable[Input]) -> Iterator[str | bytes | np.ndarray]:
    """The path, bytes or pixels of every image that the inputs name or contain, in order.

    A path that does not exist is kept.

    Raises ValueError for a folder without images and for an input that is not an image.
    """
    for image in inputs:
        if isinstance(image, str | os.PathLike):
            yield from expand(os.fsdecode(image), missing="keep")
        elif isinstance(image, bytes):
            yield image
        else:
            yield _pixels(image)


def expand(path: str, *, missing: Literal["refuse", "keep"]) -> Iterator[str]:
    """The image files that a file, folder or pattern refers to.

    A folder yields the files below it, at any depth, with the extension of an image; hidden files and folders are
    ignored, and a folder is read once, however many links lead to it. Files and folders together are in natural order
    (2.jpg before 10.jpg). A pattern such as `scans/**/*.png`
    yields the paths that match it, in the same order.

    Args:
        path: file, folder or pattern.
        missing: whether a path that does not exist is an error or is yielded as it is.

    Raises:
        ValueError: for a folder without images or one that cannot be read, and with `missing="refuse"` for a path that
            does not exist.
    """
    if os.path.isdir(path):
        images = _images_below(path, set())
        first = next(images, None)
        if first is None:
            raise ValueError(f"{path}: holds no images (looked for {' '.join(EXTENSIONS)})")
        yield first
        yield from images
        return
    matches = [path] if os.path.exists(path) else sorted(set(_matches(path)), key=natural_key)
    if not matches and missing == "refuse":
        raise ValueError(f"{path}: there is no such file or folder, and nothing matches it; correct the path")
    for match in matches or [path]:
        if os.path.isdir(match):
            yield from _images_below(match, set())
        else:
            yield match


def read_list(lines: Iterable[bytes]) -> Iterator[str]:
    """Paths of image files from a list with one path per line; empty lines are ignored.

    Raises ValueError for a line with a NUL byte, which no path contains.
    """
    for number, line in enumerate(lines, 1):
        path = line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
        if b"\0" in path:
            raise ValueError(f"line {number} of the list contains a NUL byte: write one path per line (find -print)")
        if path:
            yield os.fsdecode(path)


def natural_key(path: str) -> tuple[list[Any], str]:
    """A sort key for paths that compares numbers in names by value and the rest as text."""
    return [[_split_numbers(part) for part in os.path.splitext(name)] for name in path.split(os.sep)], path


def sample_paths(folder: Path, *, count: int, seed: int) -> list[str]:
    """A random sample of `count` image files below a folder, at any depth, in random order; all if there are fewer.

    Raises ValueError if the folder does not exist or contains no images.
    """
    paths = list(expand(str(folder), missing="refuse"))
    return random.Random(seed).sample(paths, min(count, len(paths)))


def load_images(paths: Sequence[str], spec: InputSpec) -> Tensor:
    """The images, prepared and normalised as in evaluation: (B, 3, height, width).

    Raises UnreadableImage, naming the first image that cannot be read.
    """
    pipeline = build_eval_pipeline(spec)
    images = [
        torch.from_numpy(pipeline(image=read_image(path, input_range=spec.input_range))["image"]) for path in paths
    ]
    return normalize(torch.stack(images), spec)


def load_batches(paths: Sequence[str], spec: InputSpec, *, batch_size: int) -> Iterator[Tensor]:
    """`load_images` in batches, in order; a few threads read ahead. Raises UnreadableImage as `load_images` does."""
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Tensor]] = deque()
        for first in range(0, len(paths), batch_size):
            ahead.append(pool.submit(load_images, paths[first : first + batch_size], spec))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _split_numbers(text: str) -> list[str | int]:
    # Text and numbers alternate, so a number is never compared with text.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def _matches(pattern: str) -> Iterator[str]:
    """The matches of `glob.iglob(pattern, recursive=True)`, without following circular links below `**`."""
    head, recursive, tail = _split_pattern(pattern)
    if not recursive:
        yield from glob.iglob(pattern)
        return
    for base in glob.iglob(head) if head else [""]:
        for folder in _folders_below(base, set()) if os.path.isdir(base or ".") else ():
            # Without a tail the folder stands for all that is below it.
            yield from _matches(os.path.join(glob.escape(folder), tail)) if tail else [base or "."]


def _split_pattern(pattern: str) -> tuple[str, str, str]:
    """The parts of a pattern before and after its first `**`."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return pattern, "", ""
    at = parts.index("**")
    head = os.sep.join(parts[:at])
    return head or (os.sep if at else ""), "**", os.sep.join(parts[at + 1 :])


def _folders_below(folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    """A folder and those below it, each once; hidden ones and those that cannot be read are left out, as in glob."""
    if not is_first_visit(folder or ".", visited):
        return
    yield folder
    with suppress(OSError), os.scandir(folder or ".") as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = os.path.join(folder, entry.name)
            if not entry.name.startswith(".") and os.path.isdir(path):
                yield from _folders_below(path, visited)


def _images_below(folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    if not is_first_visit(folder, visited):
        return
    for entry in sorted(list_folder(folder), key=lambda entry: natural_key(entry.name)):
        if entry.name.startswith("."):
            continue
        # A link to itself is no folder, so a row names it like any broken link.
        if os.path.isdir(entry.path):
            yield from _images_below(entry.path, visited)
        elif entry.name.lower().endswith(EXTENSIONS):
            yield entry.path


def _pixels(image: np.ndarray | Image.Image) -> np.ndarray:
    """The pixels as a file's would be decoded, (H, W, 3) or (H, W), uint8 or uint16; ValueError for other inputs."""
    if isinstance(image, Image.Image):
        try:
            # The same treatment as for files: upright, and the alpha channel dropped without blending.
            upright = ImageOps.exif_transpose(image)
            if not upright.mode.startswith(("I", "F")):
                return np.asarray(upright.convert("RGB"))
            # Pillow would clip 16 bits at 255, where files keep their upper 8 bits.
            pixels = np.asarray(upright)
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"a Pillow image cannot be read: {reason(error)}; restore its file") from error
        if upright.mode == "F" or pixels.min() < 0 or pixels.max() >= 2**16:
            raise ValueError(f"a Pillow image of mode {image.mode} with these values is not supported: convert it to L")
        return pixels.astype(np.uint16)
    is_image = isinstance(image, np.ndarray) and image.dtype.name in ("uint8", "uint16") and image.size > 0
    if not is_image or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        kind = f"an array of {image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(
            f"{kind} is not an image: give a path, a PIL image or an array (height, width, 3) RGB or (height, width), "
            "uint8 or uint16"
        )
    return image
