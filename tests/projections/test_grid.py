"""The remap by overlap area."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linvit import reference
from linvit.projections import build_projection
from linvit.projections.grid import factor_pair, remap_grid

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
@pytest.mark.parametrize("kind", ["linear", "separable"])
def test_there_and_back_is_the_same(kind, factors):
    projection = build_projection(kind, k=6, grid_size=(7, 5), num_maps=2, dtype=torch.float64)
    before = projection.matrix().clone()
    projection.set_grid_size((7 * factors[0], 5 * factors[1]))
    assert projection.matrix().shape[2] == 35 * factors[0] * factors[1]
    projection.set_grid_size((7, 5))
    torch.testing.assert_close(projection.matrix(), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "separable", "avgpool"])
def test_constant_patches_project_alike_on_a_finer_grid(kind):
    projection = build_projection(kind, k=6, grid_size=(7, 5), dtype=torch.float64)
    x = torch.randn(1, 1, 7, 5, 4, dtype=torch.float64)
    finer = x.repeat_interleave(2, 2).repeat_interleave(3, 3)
    y = projection(x.flatten(2, 3))
    torch.testing.assert_close(projection(finer.flatten(2, 3), (14, 15)), y, rtol=0, atol=1e-12)
    projection.set_grid_size((14, 15))
    torch.testing.assert_close(projection(finer.flatten(2, 3)), y, rtol=0, atol=1e-12)


def test_half_precision_is_moved_in_single():
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


@pytest.mark.parametrize(("k", "grid", "pair"), [(64, (14, 14), (8, 8)), (32, (14, 14), (4, 8)), (32, (14, 5), (8, 4))])
def test_factor_pair(k, grid, pair):
    assert factor_pair(k, grid) == pair
