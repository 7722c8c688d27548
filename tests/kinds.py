"""All kinds of projection: the lengths and sharings to test them with, and how the reference computes them."""

from functools import partial

from torch import Tensor

from linvit import reference
from linvit.model.projections import MatrixProjection, PerHeadProjection, Projection
from linvit.model.projections.grid import factor_pair

# kind → the k to test on each grid; a test compares this table with the registry.
KINDS: dict[str, dict[tuple[int, int], int]] = {
    "linear": {(7, 5): 11, (13, 13): 7, (6, 10): 13},
    "separable": {(7, 5): 12, (13, 13): 6, (6, 10): 8},
    "conv": {(7, 5): 12, (13, 13): 6, (6, 10): 8},
    "avgpool": {(7, 5): 12, (13, 13): 6, (6, 10): 8},
    "maxpool": {(7, 5): 12, (13, 13): 6, (6, 10): 8},
    "random": {(7, 5): 11, (13, 13): 7, (6, 10): 13},
    "dct": {(7, 5): 11, (13, 13): 7, (6, 10): 13},
    "identity": {(7, 5): 1, (13, 13): 1, (6, 10): 1},
}
GRIDS = [(7, 5), (13, 13), (6, 10)]
SHARES = ["none", "headwise", "kv", "layerwise"]

# The same for every head, and for E and F.
FIXED = ["avgpool", "maxpool", "dct"]
# These kinds reduce tokens: they are not matrices and have no per-head order.
REDUCING = ["conv", "maxpool"]

KIND_SHARES = [(kind, share) for kind in KINDS for share in SHARES if kind not in FIXED or share in ("kv", "layerwise")]


def orders_of(kind: str) -> list[str]:
    return ["associative", "folded"] if kind in REDUCING else ["per_head", "associative", "folded"]


def reductions(projection: Projection, num_heads: int, present: Tensor | None = None) -> list[reference.Reduction]:
    """E of each head in the form that the reference takes; `present` (B, N) is for kinds that reduce tokens."""
    if isinstance(projection, PerHeadProjection):
        return [found for head in projection.each_head() for found in reductions(head, 1, present)]
    if isinstance(projection, MatrixProjection):
        maps = [*projection.matrix().double()]
    else:
        cells = factor_pair(projection.k, projection.grid_size)
        where = dict(grid=projection.grid_size, cells=cells, present=present)
        if projection.kind == "maxpool":
            maps = [partial(reference.max_pool, **where)]
        else:
            parameters = zip(projection.weight, projection.gamma, projection.beta)
            maps = [partial(reference.depthwise_conv, weight=w, gamma=g, beta=b, **where) for w, g, b in parameters]
        area = reference.average_pool_matrix(projection.grid_size, cells)
        maps = [reference.Pooling(reduce, area) for reduce in maps]
    return maps * (num_heads // len(maps))
