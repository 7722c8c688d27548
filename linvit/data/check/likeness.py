"""How much two images agree in their fine details, which tells a copy from a picture of the same kind of thing."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from linvit.data.check.pool import Pool
from linvit.data.check.reading import Reader
from linvit.data.read import UnreadableImage, decode_image

# Sides in pixels that images are compared at, at most.
_LARGEST = 256
_CHUNK = 64


class Pair(NamedTuple):
    """Two images of the listing, by index and path."""

    a: int
    b: int
    path_a: str
    path_b: str


def likeness_of_pairs(pool: Pool[Reader], pairs: Sequence[Pair], on_pairs: Callable[[int], None]) -> np.ndarray:
    """The `likeness` (P,) of every pair; `on_pairs` is told how many more are done."""
    # Sorted, so that an image is mostly decoded once for all its pairs.
    order = sorted(range(len(pairs)), key=lambda place: pairs[place])
    chunks = [[pairs[place] for place in order[first : first + _CHUNK]] for first in range(0, len(order), _CHUNK)]
    found: list[float] = []
    for values in pool.map(_compare, chunks):
        found += values
        on_pairs(len(values))
    likeness = np.empty(len(pairs))
    likeness[order] = found
    return likeness


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation, -1 to 1, of the details of two images (H, W, 3) uint8, brought to the smaller size."""
    height, width = (min(*sides, _LARGEST) for sides in zip(a.shape[:2], b.shape[:2]))
    return float(details(a, height, width) @ details(b, height, width))


def details(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """What a blur of 2 pixels takes away from the grey image of that size, as a vector of length 1, or 0 without any.

    Clipped at twice their median size: else a few strong edges, such as a common frame, would outweigh all the rest.
    """
    grey = cv2.cvtColor(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    values = grey.astype(np.float32)
    values -= cv2.GaussianBlur(values, (0, 0), 2)
    most = 2 * float(np.median(np.abs(values)))
    values = values.clip(-most, most).ravel()
    values -= values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-9)


def _compare(reader: Reader, pairs: list[Pair]) -> list[float]:
    @lru_cache(maxsize=2 * _CHUNK)
    def read(index: int, path: str) -> np.ndarray:
        image = decode_image(reader.source.read(index, path), name=path)
        height, width = (min(side, _LARGEST) for side in image.shape[:2])
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)

    @lru_cache(maxsize=2 * _CHUNK)
    def details_of(index: int, path: str, height: int, width: int) -> np.ndarray:
        return details(read(index, path), height, width)

    found = []
    for a, b, path_a, path_b in pairs:
        try:
            height, width = (min(sides) for sides in zip(read(a, path_a).shape[:2], read(b, path_b).shape[:2]))
            found.append(float(details_of(a, path_a, height, width) @ details_of(b, path_b, height, width)))
        except UnreadableImage:
            # Gone since it was inspected.
            found.append(-1.0)
    return found
