"""Which E and F go together in one attention layer."""

from linvit.model.projections.base import MatrixProjection, Projection
from linvit.model.projections.identity import IdentityProjection


def check_pair(key: Projection | None, value: Projection | None, *, num_heads: int) -> None:
    """Raise ValueError where E `key` and F `value` (None: E as well) do not go together in a layer of so many heads.

    Matrices of any two kinds do, on one grid and with as many rows in each head.
    """
    if key is None:
        if value is not None:
            raise ValueError("value_projection (F) needs a key_projection (E): give E, or leave out both")
        return
    for name, projection in (("key_projection", key), ("value_projection", value)):
        if projection is not None and projection.num_maps not in (1, num_heads):
            raise ValueError(
                f"{name} has {projection.num_maps} maps for {num_heads} heads: build it with num_maps=1 or {num_heads}"
            )
    if value is None:
        return
    if _family(key) != _family(value):
        raise ValueError(
            f"key_projection {key.kind!r} and value_projection {value.kind!r} do not go together: both are matrices "
            "on the patches, or both are of one kind"
        )
    if key.grid_size != value.grid_size:
        raise ValueError(f"key_projection is for a grid {key.grid_size}, value_projection for {value.grid_size}")
    of_keys, of_values = (each.lengths * (num_heads // each.num_maps) for each in (key, value))
    if of_keys != of_values:
        raise ValueError(
            f"key_projection has k={_shortly(of_keys)}, value_projection k={_shortly(of_values)}: every projected key "
            "needs a value"
        )


def _family(projection: Projection) -> str:
    is_matrix = isinstance(projection, MatrixProjection) and not isinstance(projection, IdentityProjection)
    return "matrix" if is_matrix else projection.kind


def _shortly(lengths: list[int]) -> int | list[int]:
    return lengths[0] if len(set(lengths)) == 1 else lengths
