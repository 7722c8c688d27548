"""Tiles cover the image, overlap as requested, and stay inside it."""

import itertools

import numpy as np
import pytest

from linvit.data.tiling import Box, Tiling, create_tiling

SIDES = (1, 2, 15, 16, 17, 29, 31, 64, 100)


def test_the_last_tile_is_moved_back_into_the_image() -> None:
    boxes = Tiling((1024, 1024), overlap=128).boxes(1024, 2500)
    assert boxes == [Box(0, left, 1024, 1024) for left in (0, 896, 1476)]


def test_tiles_go_row_by_row() -> None:
    boxes = Tiling((2, 3), overlap=0).boxes(4, 5)
    assert boxes == [Box(0, 0, 2, 3), Box(0, 2, 2, 3), Box(2, 0, 2, 3), Box(2, 2, 2, 3)]


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@pytest.mark.parametrize("overlap", [0, 3, 11])
def test_every_pixel_is_covered_and_neighbours_overlap(size: tuple[int, int], overlap: int) -> None:
    tiling = Tiling(size, overlap)
    for height, width in itertools.product(SIDES, SIDES):
        boxes = tiling.boxes(height, width)
        covered = np.zeros((height, width), bool)
        for box in boxes:
            window = covered[box.top : box.top + box.height, box.left : box.left + box.width]
            assert window.shape == (box.height, box.width)
            window[:] = True
        assert covered.all()
        assert len(boxes) == tiling.num_boxes(height, width)
        assert len(set(boxes)) == len(boxes)
        assert len({(box.height, box.width) for box in boxes}) == 1
        if height >= size[0] and width >= size[1]:
            assert (boxes[0].height, boxes[0].width) == size
            lefts = sorted({box.left for box in boxes})
            assert all(left + size[1] - following >= overlap for left, following in itertools.pairwise(lefts))


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (1, 1024), (700, 300)])
def test_an_image_no_larger_than_a_tile_is_one_tile(height: int, width: int) -> None:
    assert Tiling((1024, 1024), overlap=128).boxes(height, width) == [Box(0, 0, height, width)]


def test_tiles_of_a_narrow_image_are_smaller_and_of_the_same_shape() -> None:
    boxes = Tiling((100, 200), overlap=20).boxes(50, 400)
    assert {(box.height, box.width) for box in boxes} == {(50, 100)}
    assert [box.left for box in boxes] == [0, 90, 180, 270, 300]


def test_a_strip_of_a_few_pixels_has_few_tiles() -> None:
    boxes = Tiling((1024, 1024), overlap=128).boxes(10, 1025)
    assert boxes == [Box(0, left, 10, 256) for left in (0, 224, 448, 672, 769)]
    assert len(Tiling((1024, 1024), overlap=128).boxes(20_000, 1)) == 90
    assert Tiling((64, 64), overlap=63).boxes(1, 70)[-1] == Box(0, 54, 1, 16)


def test_an_overlap_as_large_as_a_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="an overlap of 64 px does not fit tiles of 64×96 px; set a smaller overlap"):
        Tiling((64, 96), overlap=64)


def test_the_overlap_is_an_eighth_by_default() -> None:
    assert create_tiling(1024) == Tiling((1024, 1024), overlap=128)
    assert create_tiling((64, 32), overlap=0, merge="max") == Tiling((64, 32), overlap=0, merge="max")
    assert create_tiling(None) is None
