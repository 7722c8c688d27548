"""Each kind against its own dense matrix, and that matrix against the definition."""

import math

import pytest
import torch
from kinds import GRIDS, KINDS

from linvit import reference
from linvit.projections import PROJECTIONS, PerHeadProjection, Projection, build_projection
from linvit.projections.grid import tile_rows

CASES = [(kind, grid, maps) for kind in KINDS for grid in GRIDS for maps in (1, 3)]


def build(kind: str, grid: tuple[int, int], num_maps: int = 1, **kwargs) -> Projection:
    return build_projection(kind, k=KINDS[kind][grid], grid_size=grid, num_maps=num_maps, dtype=torch.float64, **kwargs)


def test_table_of_kinds_is_the_registry():
    assert set(KINDS) == set(PROJECTIONS)


@pytest.mark.parametrize(("kind", "grid", "maps"), CASES)
@pytest.mark.parametrize("tokens", ["shared", "per map"])
def test_forward_and_gradients_are_those_of_the_matrix(kind, grid, maps, tokens):
    projection = build(kind, grid, maps)
    width = projection.num_maps if tokens == "per map" else 1
    x = torch.randn(2, width, grid[0] * grid[1], 4, dtype=torch.float64, requires_grad=True)
    E = projection.matrix().double()
    inputs = [x, *projection.parameters()]

    fast, dense = projection(x), E @ x

    torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(dense)
    for a, b in zip(torch.autograd.grad(fast, inputs, cotangent), torch.autograd.grad(dense, inputs, cotangent)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("grid", GRIDS)
def test_avgpool_averages_by_area(grid):
    projection = build("avgpool", grid)
    expected = reference.average_pool_matrix(grid, projection.cells)
    torch.testing.assert_close(projection.matrix()[0], expected, rtol=0, atol=1e-14)


def test_separable_is_a_kronecker_product():
    projection = build("separable", (7, 5), num_maps=2)
    for E, E_h, E_w in zip(projection.matrix(), projection.weight_h, projection.weight_w):
        torch.testing.assert_close(E, torch.kron(E_h, E_w))


@pytest.mark.parametrize("kind", ["linear", "separable"])
def test_pool_init_averages(kind):
    E = build(kind, (13, 13)).matrix()[0]
    assert E.sum(1).sub(1).abs().max() < 0.5
    x = torch.randn(169, 1000, dtype=torch.float64) + 3.0
    assert (E @ x).mean().item() == pytest.approx(3.0, rel=0.2)


@pytest.mark.parametrize("kind", ["linear", "separable"])
def test_jl_init_has_variance_one_over_k(kind):
    projection = build_projection(kind, k=64, grid_size=(32, 32), init="jl", num_maps=4)
    assert projection.matrix().var().item() == pytest.approx(1 / 64, rel=0.15)


@pytest.mark.parametrize("k", [5, 7, 11, 12, 30])
def test_pool_init_of_any_k_tiles_the_grid(k):
    rows = tile_rows(k, (7, 5), device=torch.device("cpu"), dtype=torch.float64)
    assert rows.shape == (k, 7, 5)
    torch.testing.assert_close(rows.sum((1, 2)), torch.ones(k, dtype=torch.float64))
    covered = torch.linalg.lstsq(rows.flatten(1).T, torch.ones(35, 1, dtype=torch.float64)).solution
    torch.testing.assert_close(rows.flatten(1).T @ covered, torch.ones(35, 1, dtype=torch.float64))


def test_per_head_lengths():
    projection = build_projection("separable", k=[6, 4, 9], grid_size=(7, 5), num_maps=3, dtype=torch.float64)
    assert isinstance(projection, PerHeadProjection)
    assert projection.lengths == [6, 4, 9]
    x = torch.randn(2, 3, 35, 4, dtype=torch.float64)
    y = projection(x)
    assert y.shape == (2, 3, 9, 4)
    torch.testing.assert_close(y, projection.matrix() @ x)
    assert not y[:, 1, 4:].any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(kind="linaer", k=4), "did you mean 'linear'"),
        (dict(kind="linear", k=35), "k=35 does not shorten a sequence of 35 patches"),
        (dict(kind="linear", k=0), "at least 1"),
        (dict(kind="separable", k=31), "is no product"),
        (dict(kind="linear", k=[3, 4], num_maps=3), "names 2 heads, but there are 3"),
        (dict(kind="linear", k=3, init="xavier"), "unknown projection_init 'xavier'"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_projection(grid_size=(7, 5), **kwargs)


def test_row_mass_is_density():
    """Rows of the pooled start sum to one whatever the number of patches."""
    for grid in [(7, 5), (13, 13), (40, 24)]:
        E = build_projection("avgpool", k=12, grid_size=grid).matrix()
        assert math.isclose(E.sum().item(), 12, rel_tol=1e-9)
