"""The kinds of projection that E and F can be. A new kind is one file here and its name in the import below."""

import itertools
from collections.abc import Sequence
from typing import get_args

import torch

from linvit.model.projections import avgpool, conv, dct, identity, linear, maxpool, random, separable  # noqa: F401
from linvit.model.projections.base import (
    PROJECTIONS,
    MatrixProjection,
    PerHeadMatrixProjection,
    PerHeadProjection,
    Projection,
    ProjectionInit,
    check_shortens,
    is_list_of_lengths,
    parse_length,
    projection_class,
    register_projection,
)
from linvit.model.projections.grid import GridSize
from linvit.model.projections.identity import IdentityProjection
from linvit.settings.fields import unknown_choice

__all__ = [
    "PROJECTIONS",
    "GridSize",
    "IdentityProjection",
    "MatrixProjection",
    "PerHeadProjection",
    "Projection",
    "ProjectionInit",
    "build_projection",
    "maps_can_differ",
    "projection_class",
    "register_projection",
]


def build_projection(
    kind: str,
    *,
    k: int | Sequence[int],
    grid_size: GridSize,
    num_maps: int = 1,
    dim: int | None = None,
    init: ProjectionInit = "pool",
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Projection:
    """Build a projection of `kind` for an (H, W) patch grid.

    `k` is one length, or one per head (then `num_maps` is the number of heads). `dim` is the width of the tokens, which
    only `conv` needs. Raises ValueError for an unknown kind or `init`, for a k that is not a whole number or does not
    fit the grid, and for several maps of a kind whose maps are all the same.
    """
    cls = projection_class(kind)
    if init not in get_args(ProjectionInit):
        raise ValueError(unknown_choice("projection_init", init, get_args(ProjectionInit)))
    if is_list_of_lengths(k):
        if len(k) != num_maps:
            raise ValueError(f"k={list(k)} names {len(k)} heads, but there are {num_maps}")
        heads = [
            build_projection(kind, k=each, grid_size=grid_size, dim=dim, init=init, device=device, dtype=dtype)
            for each in k
        ]
        return PerHeadMatrixProjection(heads) if issubclass(cls, MatrixProjection) else PerHeadProjection(heads)
    k = parse_length(k)
    if cls is not IdentityProjection:
        check_shortens(k, grid_size)
    if num_maps > 1 and not maps_can_differ(kind):
        raise ValueError(
            f"projection {kind!r} follows from k and the grid alone: {num_maps} maps would all be the same"
        )
    projection = cls(k=k, grid_size=grid_size, num_maps=num_maps, dim=dim, init=init, device=device, dtype=dtype)
    projection.check_grid_size(grid_size)
    return projection


def maps_can_differ(kind: str) -> bool:
    """Whether two projections of `kind` with the same k and grid can differ, because they have parameters or buffers.

    They cannot if everything follows from k and the grid. For `identity`, ordinary attention, the result is True.
    """
    cls = projection_class(kind)
    probe = cls(k=1, grid_size=(2, 2), dim=1, device=torch.device("meta"))
    has_state = any(True for _ in itertools.chain(probe.parameters(), probe.buffers()))
    return has_state or cls is IdentityProjection
