"""Maps of the tiles of an image, merged into a map over the image."""

import numpy as np

from linvit.data.geometry import CropPlan
from linvit.data.tiling import Box
from linvit.explanation.overlay import place


class Mosaic:
    """A map over an image, averaged where tiles overlap.

    Args:
        shape: (height, width) of the image.
        longest_side: pixels of the longest side of the map, if it is smaller than the image.
    """

    def __init__(self, shape: tuple[int, int], *, longest_side: int | None = None) -> None:
        self._shape = shape
        self._total = np.zeros(shrunk(shape, longest_side), np.float32)
        self._count = np.zeros(self._total.shape, np.uint16)

    def add(self, box: Box, patches: np.ndarray, plan: CropPlan) -> None:
        """Add the map of a tile's patches (h, w); `plan` is what the model sees of the tile."""
        window = self._window(box)
        self._total[window] += place(patches, plan, size=self._count[window].shape)
        self._count[window] += 1

    def mean(self) -> np.ndarray:
        """The map, float32; NaN where no tile has been added."""
        with np.errstate(invalid="ignore"):
            return self._total / self._count

    def _window(self, box: Box) -> tuple[slice, slice]:
        edges = []
        for start, length, full, scaled in zip(box[:2], box[2:], self._shape, self._total.shape):
            first = min(round(start * scaled / full), scaled - 1)
            # A narrow tile still gets a pixel.
            edges.append(slice(first, max(round((start + length) * scaled / full), first + 1)))
        return edges[0], edges[1]


def shrunk(shape: tuple[int, int], longest_side: int | None) -> tuple[int, int]:
    """(height, width) with the same aspect ratio and at most this longest side; at least one pixel each."""
    scale = 1.0 if longest_side is None else min(1.0, longest_side / max(shape))
    return max(round(shape[0] * scale), 1), max(round(shape[1] * scale), 1)
