"""Who shares E and F, and the projected lengths of layers and heads.

| share       | parameters                                        | paper (section 4)   |
|-------------|---------------------------------------------------|---------------------|
| `none`      | E and F for every head of every layer             | none                |
| `headwise`  | E and F for every layer                           | headwise sharing    |
| `kv`        | one E for every layer, for keys and values alike  | key-value sharing   |
| `layerwise` | one E for all layers, heads, keys and values      | layerwise sharing   |

A projection that follows from k and the grid alone (`avgpool`, `maxpool`, `dct`) is the same for every head, and for E
and F. It can be used with `kv` and `layerwise`, and with `none` if each head has a k of its own.
"""

from collections.abc import Sequence
from typing import Literal

from linvit.model.projections import IdentityProjection, MatrixProjection, Projection
from linvit.model.projections.base import is_list_of_lengths, parse_length
from linvit.settings.fields import unknown_choice

Share = Literal["none", "headwise", "kv", "layerwise"]
SHARES: tuple[str, ...] = ("none", "headwise", "kv", "layerwise")
# One length; one per layer (None for ordinary attention there); or, with share="none", one per layer and head.
ProjectedLength = int | Sequence[int | Sequence[int] | None]


def plain_lengths(k: ProjectedLength) -> int | list[int | list[int] | None]:
    """`k` as Python ints and lists. Raises ValueError, quoting the value, for anything that is not a length."""
    if k is None:
        raise ValueError("k=None is not a length: ordinary attention in all layers is projection='identity'")
    if not is_list_of_lengths(k):
        return parse_length(k)
    return [
        None
        if length is None
        else [parse_length(each) for each in length]
        if is_list_of_lengths(length)
        else parse_length(length)
        for length in k
    ]


def length_per_layer(k: ProjectedLength, *, depth: int, share: Share) -> list[int | list[int] | None]:
    """`k` with one entry per layer.

    Raises ValueError for an unknown `share`, a wrong number of layers, and a k that `share` excludes.
    """
    if share not in SHARES:
        raise ValueError(unknown_choice("share", share, SHARES))
    lengths = plain_lengths(k)
    if isinstance(lengths, int):
        return [lengths] * depth
    if len(lengths) != depth:
        raise ValueError(f"k names {len(lengths)} layers, but the model has {depth}")
    if share != "none" and any(isinstance(length, list) for length in lengths):
        raise ValueError(f"one k per head needs share='none': with share={share!r} all heads use the same E")
    distinct = {length for length in lengths if isinstance(length, int)}
    if share == "layerwise" and len(distinct) > 1:
        raise ValueError(f"share='layerwise' means one E for all layers, so one k; got {sorted(distinct)}")
    return lengths


def check_share_of_fixed(kind: str, share: Share, lengths: Sequence[int | list[int] | None]) -> None:
    """Raise ValueError if `share` needs several maps of a `kind` that is the same for every head, and for E and F."""
    if share == "headwise" or (share == "none" and any(isinstance(length, int) for length in lengths)):
        raise ValueError(
            f"projection={kind!r} follows from k and the grid alone, so with share={share!r} all maps would be the "
            f"same: use share='kv' or 'layerwise', or share='none' with one k per head in every layer"
        )


def check_pair(key: Projection | None, value: Projection | None, *, num_heads: int) -> None:
    """Raise ValueError if E `key` and F `value` (None for E as well) cannot be used together in one attention layer.

    Two kinds of matrix can, on the same grid and with the same number of rows in each head.
    """
    if key is None:
        if value is not None:
            raise ValueError("value_projection (F) needs a key_projection (E): pass E too, or neither")
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
            f"key_projection {key.kind!r} and value_projection {value.kind!r} do not go together: use two "
            "matrices on the patches, or two projections of the same kind"
        )
    if key.grid_size != value.grid_size:
        raise ValueError(f"key_projection is for a grid {key.grid_size}, value_projection for {value.grid_size}")
    key_lengths, value_lengths = (each.lengths * (num_heads // each.num_maps) for each in (key, value))
    if key_lengths != value_lengths:
        raise ValueError(
            f"key_projection has k={_compact(key_lengths)}, value_projection k={_compact(value_lengths)}: "
            "every projected key needs a value"
        )


def _family(projection: Projection) -> str:
    is_matrix = isinstance(projection, MatrixProjection) and not isinstance(projection, IdentityProjection)
    return "matrix" if is_matrix else projection.kind


def _compact(lengths: list[int]) -> int | list[int]:
    """One number if all heads have the same length."""
    return lengths[0] if len(set(lengths)) == 1 else lengths
