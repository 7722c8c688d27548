"""Maps lie on their image where the model looked: crops, borders and other aspect ratios."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from linvit.data.geometry import EvalCrop
from linvit.data.tiling import Box
from linvit.explanation import overlay
from linvit.explanation.overlay import Mosaic, blend, normalise, place

PATCHES = np.arange(16, dtype=np.float32).reshape(4, 4)


def test_a_full_crop_repeats_the_patches():
    heat = place(PATCHES, EvalCrop((8, 8), 1.0).plan(8, 8))
    # The mean of the four pixels of a patch in the interior is its value.
    means = heat.reshape(4, 2, 4, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(means[1:3, 1:3], PATCHES[1:3, 1:3], atol=1e-6)
    assert not np.isnan(heat).any()


def test_a_centre_crop_leaves_the_rest_open():
    heat = place(PATCHES, EvalCrop((8, 8), 0.5).plan(32, 32))
    seen = ~np.isnan(heat)
    assert seen[8:24, 8:24].all()
    assert seen.sum() == 16 * 16
    assert heat[9, 9] == pytest.approx(0, abs=1)
    assert heat[22, 22] == pytest.approx(15, abs=1)


def test_a_wide_image_is_seen_in_its_middle():
    heat = place(PATCHES, EvalCrop((8, 8), 1.0).plan(10, 40))
    columns = np.flatnonzero(~np.isnan(heat).any(axis=0))
    assert (columns.min(), columns.max()) == (15, 24)


def test_padding_lies_outside_of_the_image():
    heat = place(PATCHES, EvalCrop((8, 8), 1.0, "border").plan(4, 8))
    assert heat.shape == (4, 8)
    assert not np.isnan(heat).any()
    # The image fills the two middle rows of patches.
    assert heat[:, 0].min() >= 2
    assert heat[:, 0].max() <= 10


def test_a_squashed_image_is_stretched_back():
    heat = place(PATCHES, EvalCrop((8, 8), 1.0, "squash").plan(20, 60))
    assert heat.shape == (20, 60)
    assert heat[0, 0] == 0
    assert heat[-1, -1] == 15


def test_values_run_from_nothing_to_the_largest():
    heat = normalise(np.array([[-3.0, 0.0], [2.0, np.nan]]))
    np.testing.assert_equal(heat, [[0, 0], [1, np.nan]])
    np.testing.assert_equal(normalise(np.array([[-1.0, np.nan]])), [[0, np.nan]])


def test_what_the_model_does_not_see_is_dark():
    image = np.full((2, 2, 3), 200, np.uint8)
    shown = blend(image, np.array([[0.0, 1.0], [0.5, np.nan]]))
    assert (shown[1, 1] == 80).all()
    assert shown[0, 1].mean() > shown[0, 0].mean()


def test_a_smaller_map_has_the_values_at_the_centres_of_its_pixels():
    plan = EvalCrop((8, 8), 0.5).plan(90, 60)
    full, small = place(PATCHES, plan), place(PATCHES, plan, size=(30, 20))
    np.testing.assert_allclose(small, full[1::3, 1::3], atol=1e-6)


def test_tiles_are_averaged_where_they_overlap_at_any_size():
    plan = EvalCrop((8, 8), 1.0, "squash").plan(20, 40)
    for side, width in ((None, 60), (30, 30)):
        mosaic = Mosaic((20, 60), longest_side=side)
        for left, value in ((0, 1.0), (20, 2.0)):
            mosaic.add(Box(0, left, 20, 40), np.full((4, 4), value, np.float32), plan)
        third = width // 3
        expected = np.repeat([1, 1.5, 2], third)[None].repeat(third, axis=0)
        np.testing.assert_allclose(mosaic.mean(), expected, rtol=1e-6)


def test_an_image_of_a_few_pixels_keeps_one_per_tile():
    mosaic = Mosaic((1, 1000), longest_side=10)
    for left in range(0, 1000, 50):
        mosaic.add(Box(0, left, 1, 50), PATCHES, EvalCrop((8, 8), 1.0, "squash").plan(1, 50))
    assert mosaic.mean().shape == (1, 10)
    assert not np.isnan(mosaic.mean()).any()


def test_a_long_title_is_not_cut_off(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(overlay, "save_figure", lambda path, figure, dpi: figures.append(figure))
    image = np.zeros((300, 300, 3), np.uint8)
    title = overlay.title_of(
        "mono_defective",
        0.825,
        method="relevance",
        explained="mono_defective",
    )
    overlay.save_overlay(tmp_path / "a.png", image, np.ones((300, 300)), title=title)
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    text = figure.axes[0].title
    assert text.get_text().replace("\n", " ") == title
    box, page = text.get_window_extent(), figure.bbox
    assert box.x0 >= 0
    assert box.y1 <= page.y1
    assert box.x1 <= page.x1
