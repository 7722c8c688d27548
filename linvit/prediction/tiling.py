"""Large images as overlapping tiles: where these lie."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from linvit.settings.fields import height_and_width


class Box(NamedTuple):
    """A window of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Tiling:
    """How images are cut, and what the probabilities of their tiles become together.

    Args:
        size: (height, width) of a tile in pixels.
        overlap: pixels that neighbours share, at least.
        merge: the mean of the tiles' probabilities, or of every class the largest (these do not add up to 1).

    Raises ValueError where tiles would not move on.
    """

    size: tuple[int, int]
    overlap: int
    merge: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < min(self.size):
            height, width = self.size
            raise ValueError(
                f"an overlap of {self.overlap} px does not fit tiles of {height}×{width} px: set a smaller"
            )

    def boxes(self, height: int, width: int) -> list[Box]:
        """The tiles of an image from its top left, row by row; the whole image where it is no larger than a tile.

        The last tile of a row or column is moved back into the image, so that nothing is padded. In an image that is
        narrower or flatter than a tile, tiles are smaller: as large as fits, of the same shape.
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
    """Tiles of that side, or height and width, that overlap by an eighth unless told otherwise; None for None."""
    if size is None:
        return None
    height, width = height_and_width(size)
    return Tiling((height, width), min(height, width) // 8 if overlap is None else overlap, merge)


def _starts(length: int, tile: int, overlap: int) -> Iterator[int]:
    """Where tiles begin along a side of an image."""
    yield from range(0, length - tile, tile - overlap)
    yield length - tile
