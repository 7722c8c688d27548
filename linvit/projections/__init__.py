"""Kinds of projection: what E and F are. A new kind is one file here and one import line below."""

from collections.abc import Sequence

import torch

from linvit.projections import avgpool, identity, linear, separable  # noqa: F401
from linvit.projections.base import (
    PROJECTIONS,
    Projection,
    ProjectionInit,
    check_shortens,
    projection_class,
    register_projection,
)
from linvit.projections.grid import GridSize
from linvit.projections.identity import IdentityProjection
from linvit.projections.per_head import PerHeadProjection

__all__ = [
    "PROJECTIONS",
    "GridSize",
    "IdentityProjection",
    "PerHeadProjection",
    "Projection",
    "ProjectionInit",
    "build_projection",
    "projection_class",
    "register_projection",
]


def build_projection(
    kind: str,
    *,
    k: int | Sequence[int],
    grid_size: GridSize,
    num_maps: int = 1,
    init: ProjectionInit = "pool",
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Projection:
    """A projection of `kind` for an (H, W) patch grid.

    `k` is one length, or one per head (then `num_maps` is the number of heads). Raises ValueError for an unknown kind
    and for a k that the grid cannot hold.
    """
    cls = projection_class(kind)
    if init not in ("pool", "jl"):
        raise ValueError(f"unknown projection_init {init!r} (there are pool, jl)")
    if not isinstance(k, int):
        if len(k) != num_maps:
            raise ValueError(f"k={list(k)} names {len(k)} heads, but there are {num_maps}")
        heads = [
            build_projection(kind, k=each, grid_size=grid_size, init=init, device=device, dtype=dtype) for each in k
        ]
        return PerHeadProjection(heads)
    if cls is not IdentityProjection:
        check_shortens(k, grid_size)
    return cls(k=k, grid_size=grid_size, num_maps=num_maps, init=init, device=device, dtype=dtype)
