"""Remapping to other grids by overlap area, and factor pairs."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import FIXED, KINDS, REDUCING

from linvit import reference
from linvit.model.projections import build_projection
from linvit.model.projections.grid import factor_pair, remap_grid

sides = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(sides, sides, sides, sides)
def test_matches_the_definition_and_keeps_row_sums(h, w, new_h, new_w):
    E = torch.randn(3, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(h * 10 + w))
    moved = remap_grid(E, (new_h, new_w))
    torch.testing.assert_close(
        moved.flatten(1), reference.remap(E.flatten(1), (h, w), (new_h, new_w)), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(moved.sum((1, 2)), E.sum((1, 2)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("factors", [(2, 2), (2, 3), (1, 4)])
@pytest.mark.parametrize("kind", ["linear", "separable", "random"])
def test_moving_there_and_back_changes_nothing(kind, factors):
    projection = build_projection(kind, k=6, grid_size=(7, 5), num_maps=2, dtype=torch.float64)
    before = projection.matrix().clone()
    projection.set_grid_size((7 * factors[0], 5 * factors[1]))
    assert projection.matrix().shape[2] == 35 * factors[0] * factors[1]
    projection.set_grid_size((7, 5))
    torch.testing.assert_close(projection.matrix(), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [6, [6, 4, 9]], ids=str)
@pytest.mark.parametrize(
    ("kind", "factors"),
    [(kind, (2, 2)) for kind in KINDS if kind != "identity"]
    # If the weights fix the rows and columns, or there are none, the shape may change too.
    + [(kind, (2, 3)) for kind in ("linear", "separable", "random")]
    + [(kind, (3, 3)) for kind in ("conv", "maxpool", "dct")],
)
def test_constant_patches_project_alike_on_a_finer_grid(kind, factors, k):
    maps = 1 if isinstance(k, int) else len(k)
    projection = build_projection(kind, k=k, num_maps=maps, grid_size=(7, 5), dim=4, dtype=torch.float64)
    x = torch.randn(2, 1, 7, 5, 4, dtype=torch.float64)
    finer = x.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3).flatten(2, 3)
    grid = 7 * factors[0], 5 * factors[1]
    y = projection(x.flatten(2, 3))
    torch.testing.assert_close(projection(finer, grid), y, rtol=0, atol=1e-12)
    projection.set_grid_size(grid)
    torch.testing.assert_close(projection(finer), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(14, 10), (4, 16), (9, 9), (5, 7)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_grid_per_batch_equals_the_moved_projection(kind, grid):
    projection = build_projection(kind, k=6, grid_size=(7, 5), dim=4, dtype=torch.float64)
    x = torch.randn(2, 1, grid[0] * grid[1], 4, dtype=torch.float64)
    y = projection(x, grid)
    projection.set_grid_size(grid)
    torch.testing.assert_close(projection(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", FIXED)
def test_fixed_kinds_do_not_depend_on_earlier_grids(kind):
    moved = build_projection(kind, k=8, grid_size=(8, 8))
    moved.set_grid_size((4, 16))
    built = build_projection(kind, k=8, grid_size=(4, 16))
    x = torch.randn(2, 1, 64, 4)
    torch.testing.assert_close(moved(x), built(x), rtol=0, atol=0)
    assert not torch.allclose(moved(x), build_projection(kind, k=8, grid_size=(8, 8))(x))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("identity", *REDUCING)])
def test_moving_keeps_row_sums(kind):
    projection = build_projection(kind, k=6, grid_size=(7, 5), dtype=torch.float64)
    before = projection.matrix().sum(2)
    projection.set_grid_size((11, 8))
    torch.testing.assert_close(projection.matrix().sum(2), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_every_kind_refuses_a_grid_too_small(kind):
    projection = build_projection(kind, k=12, grid_size=(7, 5), dim=4)
    with pytest.raises(ValueError, match="k=12 does not shorten a sequence of 12 patches"):
        projection.set_grid_size((4, 3))
    assert projection.grid_size == (7, 5)


@pytest.mark.parametrize("kind", ["avgpool", "maxpool", "conv"])
def test_cells_that_fit_no_longer_are_refused(kind):
    projection = build_projection(kind, k=7, grid_size=(7, 5), dim=4)
    with pytest.raises(ValueError, match="k=7 is not a product k_h × k_w that fits a 6×6 patch grid"):
        projection.set_grid_size((6, 6))


def test_half_precision_is_moved_in_single_precision():
    E = torch.rand(4, 7, 7)
    moved = remap_grid(E.bfloat16(), (14, 14))
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(moved.float(), remap_grid(E.bfloat16().float(), (14, 14)).bfloat16().float())


def test_resizing_keeps_frozen_parameters_frozen_and_refuses_too_small_a_grid():
    projection = build_projection("separable", k=9, grid_size=(7, 5))
    projection.requires_grad_(False)
    projection.set_grid_size((9, 9))
    assert not any(parameter.requires_grad for parameter in projection.parameters())
    with pytest.raises(ValueError, match="k=9 does not shorten a sequence of 9 patches"):
        projection.set_grid_size((3, 3))
    with pytest.raises(ValueError, match="3×3 cells does not fit"):
        projection.set_grid_size((2, 20))
    assert projection.grid_size == (9, 9)


@pytest.mark.parametrize(
    ("k", "grid", "pair"),
    [
        (64, (14, 14), (8, 8)),
        (32, (14, 14), (4, 8)),
        (32, (14, 5), (8, 4)),
        (16, (4, 16), (2, 8)),
        (64, (64, 16), (16, 4)),
        (49, (14, 14), (7, 7)),
        # 2 × 8 and 4 × 4 are as near to 2 : 4; the square one is taken.
        (16, (8, 16), (4, 4)),
        (13, (3, 40), (1, 13)),
    ],
)
def test_factor_pair(k, grid, pair):
    assert factor_pair(k, grid) == pair


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(2, 20), st.integers(2, 20))
def test_factor_pair_is_the_nearest_in_shape(k, height, width):
    def distance(pair):
        ratio = Fraction(pair[0] * width, pair[1] * height)
        return max(ratio, 1 / ratio), abs(pair[0] - pair[1]), pair[0]

    fitting = [(a, k // a) for a in range(1, k + 1) if k % a == 0 and a <= height and k // a <= width]
    if fitting:
        assert factor_pair(k, (height, width)) == min(fitting, key=distance)
    else:
        with pytest.raises(ValueError, match=f"k={k} is not a product"):
            factor_pair(k, (height, width))
