"""Where the overlapping tiles of a large image are. `tiles` reads them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from linvit.settings.fields import height_and_width


class Box(NamedTuple):
    """A window of an image, in pixels of the image."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Tiling:
    """How images are cut into tiles, and how the probabilities of the tiles are merged.

    Args:
        size: (height, width) of a tile in pixels.
        overlap: minimum number of pixels that neighbouring tiles share.
        merge: the mean of the tiles' probabilities, or the maximum for each class (which do not sum to 1).

    Raises ValueError if the overlap is negative or not smaller than a tile.
    """

    size: tuple[int, int]
    overlap: int
    merge: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < min(self.size):
            height, width = self.size
            raise ValueError(
                f"an overlap of {self.overlap} px does not fit tiles of {height}×{width} px; set a smaller overlap"
            )

    def boxes(self, height: int, width: int) -> list[Box]:
        """The tiles of an image, row by row from the top left; the full image if it is no larger than a tile.

        The last tile of a row or column is moved back into the image, so nothing is padded. If the image is smaller
        than a tile in one dimension only, the tiles shrink to fit, with the same aspect ratio.
        """
        shrink = min(1.0, height / self.size[0], width / self.size[1])
        if height <= self.size[0] and width <= self.size[1]:
            return [Box(0, 0, height, width)]
        tile_height, tile_width = (max(round(length * shrink), 1) for length in self.size)
        overlap = min(int(self.overlap * shrink), min(tile_height, tile_width) - 1)
        return [
            Box(top, left, tile_height, tile_width)
            for top in _starts(height, tile_height, overlap)
            for left in _starts(width, tile_width, overlap)
        ]


def create_tiling(
    size: int | tuple[int, int] | None, *, overlap: int | None = None, merge: Literal["mean", "max"] = "mean"
) -> Tiling | None:
    """Tiles of this side, or (height, width), that overlap by an eighth by default; None if `size` is None."""
    if size is None:
        return None
    height, width = height_and_width(size)
    return Tiling((height, width), min(height, width) // 8 if overlap is None else overlap, merge)


def _starts(length: int, tile: int, overlap: int) -> Iterator[int]:
    """The offsets of the tiles along one side of an image."""
    yield from range(0, length - tile, tile - overlap)
    yield length - tile
