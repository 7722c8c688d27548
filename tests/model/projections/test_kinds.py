"""Each kind equals its own dense matrix, and that matrix, or the reduction, equals the definition."""

import math

import pytest
import torch
from kinds import FIXED, GRIDS, KINDS, REDUCING, reductions
from torch.utils._python_dispatch import TorchDispatchMode

from linvit import reference
from linvit.model.projections import (
    PROJECTIONS,
    MatrixProjection,
    PerHeadProjection,
    Projection,
    build_projection,
    maps_can_differ,
)
from linvit.model.projections.grid import factor_pair, tile_rows

CASES = [(kind, grid, maps) for kind in KINDS for grid in GRIDS for maps in (1, 3) if maps == 1 or kind not in FIXED]


def build(kind: str, grid: tuple[int, int], num_maps: int = 1, **kwargs) -> Projection:
    k = KINDS[kind][grid]
    return build_projection(kind, k=k, grid_size=grid, num_maps=num_maps, dim=4, dtype=torch.float64, **kwargs)


def test_table_of_kinds_is_the_registry():
    assert set(KINDS) == set(PROJECTIONS)
    assert set(FIXED) == {kind for kind in PROJECTIONS if not maps_can_differ(kind)}
    assert set(REDUCING) == {kind for kind, cls in PROJECTIONS.items() if not issubclass(cls, MatrixProjection)}


class DispatchedOperations(TorchDispatchMode):
    """Records the names of the operations called, including views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.__name__.partition(".")[0])
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "grid", "maps"), [case for case in CASES if case[0] not in REDUCING])
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


@pytest.mark.parametrize("other", [None, (9, 11)])
@pytest.mark.parametrize(("kind", "grid", "maps"), CASES)
def test_row_mass_is_that_of_the_absolute_matrix_or_the_area(kind, grid, maps, other):
    projection = build(kind, grid, maps)
    height, width = other or grid
    x = torch.rand(2, 1, height * width, 1, dtype=torch.float64)
    mass = projection.row_mass(x, other)
    if other:
        projection.set_grid_size(other)
    if kind in REDUCING:
        rows = reference.average_pool_matrix((height, width), factor_pair(projection.k, (height, width)))[None]
    else:
        rows = projection.matrix().double().abs()
    expected = rows @ x
    torch.testing.assert_close(mass.expand_as(expected), expected, rtol=0, atol=1e-12)
    assert mass.shape[1] in (1, maps)


def test_default_row_mass():
    x = torch.rand(2, 1, 35, 1, dtype=torch.float64)
    matrix = build("linear", (7, 5), 3)
    torch.testing.assert_close(MatrixProjection.row_mass(matrix, x), matrix.row_mass(x), rtol=0, atol=1e-12)
    reduction = build("conv", (7, 5), 3)
    found = Projection.row_mass(reduction, x)
    torch.testing.assert_close(found, x.mean(2, keepdim=True).expand(2, 3, 12, 1), rtol=0, atol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_avgpool_averages_by_area(grid):
    projection = build("avgpool", grid)
    expected = reference.average_pool_matrix(grid, factor_pair(projection.k, grid))
    torch.testing.assert_close(projection.matrix()[0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("kind", "grid", "maps"), [case for case in CASES if case[0] in REDUCING])
def test_reductions_are_those_of_the_reference(kind, grid, maps):
    projection = build(kind, grid, maps)
    for parameter in projection.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 1, grid[0] * grid[1], 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *projection.parameters()]

    fast = projection(x)
    slow = torch.stack([reduce(x[:, 0]) for reduce in reductions(projection, maps)], dim=1)

    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-11)
    cotangent = torch.randn_like(slow)
    for a, b in zip(torch.autograd.grad(fast, inputs, cotangent), torch.autograd.grad(slow, inputs, cotangent)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_patches_count_in_every_cell_they_overlap():
    """On 4 × 2 cells of a 6 × 2 grid, rows 1 and 4 lie in two cells each."""
    x = torch.zeros(1, 1, 6, 2, 1)
    x[0, 0, 1, 0], x[0, 0, 5, 1] = 2.0, 3.0
    projection = build_projection("maxpool", k=8, grid_size=(6, 2))
    pooled = projection(x.flatten(2, 3)).reshape(4, 2)
    torch.testing.assert_close(pooled, torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 3.0]]))


@pytest.mark.parametrize("grid", [*GRIDS, (4, 9), (12, 12)])
@pytest.mark.parametrize("k", [1, 5, 16, 30])
def test_cosine_modes_are_the_lowest(grid, k):
    projection = build_projection("dct", k=k, grid_size=grid, dtype=torch.float64)
    expected = reference.dct_matrix(grid, reference.dct_modes(k, grid))
    torch.testing.assert_close(projection.matrix()[0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("grid", GRIDS)
def test_first_cosine_mode_is_the_mean_and_rows_are_orthogonal(grid):
    E = build("dct", grid).matrix()[0]
    patches = grid[0] * grid[1]
    torch.testing.assert_close(E[0], torch.full_like(E[0], 1 / patches))
    gram = E @ E.T
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-14)
    assert gram.diagonal().min() > 0


def test_random_matrix_follows_theorem_2_and_is_saved():
    projection = build_projection("random", k=64, grid_size=(32, 32), num_maps=4, init="pool")
    E = projection.matrix()
    assert E.var().item() == pytest.approx(1 / 64, rel=0.05)
    assert E.mean().item() == pytest.approx(0, abs=0.001)
    assert not list(projection.parameters())
    other = build_projection("random", k=64, grid_size=(32, 32), num_maps=4)
    other.load_state_dict(projection.state_dict())
    torch.testing.assert_close(other.matrix(), E, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["linear", "separable"])
def test_averages_have_no_noise_and_pooling_little(kind):
    average, pool = (
        build_projection(kind, k=16, grid_size=(8, 8), init=init).matrix()[0] for init in ("average", "pool")
    )
    cells = build_projection("avgpool", k=16, grid_size=(8, 8)).matrix()[0].float()
    torch.testing.assert_close(average, cells)
    assert 0.05 < (pool - cells).abs().max() / cells.max() < 0.8


@pytest.mark.parametrize("init", ["pool", "jl"])
def test_convolution_starts_at_an_average_or_at_noise(init):
    projection = build_projection("conv", k=16, grid_size=(32, 32), dim=64, init=init)
    mean, deviation = (1 / 64, 0.1 / 64) if init == "pool" else (0.0, 1 / 8)
    assert projection.weight.shape == (1, 64, 8, 8)
    assert projection.weight.mean().item() == pytest.approx(mean, abs=0.006)
    assert projection.weight.std().item() == pytest.approx(deviation, rel=0.1)
    average = build_projection("conv", k=16, grid_size=(32, 32), dim=64, init="average")
    assert bool((average.weight == 1 / 64).all())


def test_separable_copies_no_token():
    projection = build_projection("separable", k=12, grid_size=(7, 5))
    tokens = torch.randn(3, 1, 36, 8)
    with DispatchedOperations() as called:
        projection(tokens[:, :, 1:])
    assert called.names.count("bmm") == 2
    assert not {"clone", "copy_", "_to_copy"} & set(called.names)


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


@pytest.mark.parametrize("kind", REDUCING)
def test_per_head_lengths_of_reductions(kind):
    projection = build_projection(kind, k=[6, 4, 9], grid_size=(7, 5), num_maps=3, dim=4, dtype=torch.float64)
    assert not isinstance(projection, MatrixProjection)
    assert (projection.kind, projection.lengths) == (kind, [6, 4, 9])
    x = torch.randn(2, 1, 35, 4, dtype=torch.float64)
    y = projection(x)
    assert not y[:, 1, 4:].any()
    for head, reduce in enumerate(reductions(projection, 3)):
        torch.testing.assert_close(y[:, head, : projection.lengths[head]], reduce(x[:, 0]), rtol=0, atol=1e-11)


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
        (dict(kind="separable", k=31), "is not a product"),
        (dict(kind="linear", k=[3, 4], num_maps=3), "names 2 heads, but there are 3"),
        (dict(kind="linear", k=3, init="xavier"), "unknown projection_init 'xavier'"),
        (dict(kind="maxpool", k=31), "is not a product"),
        (dict(kind="conv", k=31, dim=4), "is not a product"),
        (dict(kind="conv", k=6), "build it with dim="),
        *((dict(kind=kind, k=6, num_maps=3), "3 maps would all be the same") for kind in FIXED),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_projection(grid_size=(7, 5), **kwargs)


def test_row_mass_is_density():
    """Rows of the pooled start sum to one for every number of patches."""
    for grid in [(7, 5), (13, 13), (40, 24)]:
        E = build_projection("avgpool", k=12, grid_size=grid).matrix()
        assert math.isclose(E.sum().item(), 12, rel_tol=1e-9)
