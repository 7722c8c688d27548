"""Positions of the overlapping tiles of a large image. `tiles` reads them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from linvit.settings.fields import height_and_width

# Tiles shrink to at least this share of their size in images that are smaller than a tile in one dimension.
_SMALLEST_SHRINK = 0.25


class Box(NamedTuple):
    """A window of an image, in pixels of the image."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Tiling:
    """Cuts images into tiles and merges the probabilities of the tiles.

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
        than a tile in one dimension only, the tiles shrink to fit, with the same aspect ratio, down to a quarter of
        their size. In an image that is still smaller, the tiles are a quarter as long and as narrow as the image, so a
        strip of a few pixels is not cut into hundreds of tiles.
        """
        tile, tops, lefts = self._grid(height, width)
        return [Box(top, left, *tile) for top in tops for left in lefts]

    def num_boxes(self, height: int, width: int) -> int:
        """The number of tiles of an image, without listing them."""
        _, tops, lefts = self._grid(height, width)
        return len(tops) * len(lefts)

    def _grid(self, height: int, width: int) -> tuple[tuple[int, int], list[int], list[int]]:
        """The (height, width) of a tile, and the tops and lefts of the rows and columns of tiles."""
        if height <= self.size[0] and width <= self.size[1]:
            return (height, width), [0], [0]
        shrink = max(min(1.0, height / self.size[0], width / self.size[1]), _SMALLEST_SHRINK)
        tile_height, tile_width = (
            min(max(round(tile * shrink), 1), length) for tile, length in zip(self.size, (height, width))
        )
        tops, lefts = (
            _starts(length, tile, min(int(self.overlap * shrink), tile - 1))
            for length, tile in ((height, tile_height), (width, tile_width))
        )
        return (tile_height, tile_width), tops, lefts


def create_tiling(
    size: int | tuple[int, int] | None, *, overlap: int | None = None, merge: Literal["mean", "max"] = "mean"
) -> Tiling | None:
    """Tiles of this side, or (height, width), that overlap by an eighth by default; None if `size` is None."""
    if size is None:
        return None
    height, width = height_and_width(size)
    return Tiling((height, width), min(height, width) // 8 if overlap is None else overlap, merge)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """The offsets of the tiles along one side of an image."""
    return [*range(0, length - tile, tile - overlap), length - tile]
