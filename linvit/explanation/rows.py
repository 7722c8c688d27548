"""What a page needs to show where each patch looks: the two factors of every layer's attention, in 8 bits.

In a Linformer layer, row i of the attention matrix is row i of P̄ (K keys) times F (K × T), so a page holds N × k
numbers per layer and head, never N × N, and computes a row when it is shown. Where all heads share F, the mean over
heads of the rows is that of P̄ times F. In ordinary layers F is the identity and K = T.

T tokens, P prefix tokens, N patches, K keys, k projected length, H heads, M maps of a projection.
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch

from linvit.explanation.maps import Explanation, dense_rows, weighted_rows
from linvit.measure.attention import LayerAttention
from linvit.model.projections import Projection
from linvit.model.projections.grid import remap_axis
from linvit.model.projections.separable import SeparableProjection

# Bytes of base64 per byte.
TEXT = 4 / 3
# Level 6 takes twice as long for 2 % less.
_LEVEL = 4
_TYPES = {np.dtype(np.uint8): "u1", np.dtype(np.int8): "i1", np.dtype(np.float32): "f4"}


class Pack:
    """Arrays in one block of bytes. `rows.js` gets the text, and of each array what `add` returned."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0

    def add(self, array: np.ndarray) -> dict[str, Any]:
        """Append an array of uint8, int8 or float32; returns its offset in bytes, shape and type."""
        place = {"at": self._length, "shape": list(array.shape), "type": _TYPES[array.dtype]}
        data = array.astype(array.dtype.newbyteorder("<"), order="C").tobytes()
        # Arrays of float32 begin at a multiple of their size.
        data += b"\0" * (-len(data) % 4)
        self._parts.append(data)
        self._length += len(data)
        return place

    def add_quantised(self, rows: np.ndarray) -> dict[str, Any]:
        """Append rows (…, C) in 8 bits and the step of each row; returns where both are."""
        values, steps = quantise(rows)
        return {"values": self.add(values), "steps": self.add(steps)}

    def text(self) -> str:
        """The block, compressed by zlib and in base64."""
        return base64.b64encode(zlib.compress(b"".join(self._parts), _LEVEL)).decode()


def quantise(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (…, C) as whole numbers of steps, uint8 or, where a number is negative, int8; and the step of each row (…).

    Each number is within half a step, which is the row's largest magnitude / 255 or 127.
    """
    kind = np.dtype(np.int8) if (rows < 0).any() else np.dtype(np.uint8)
    largest = np.iinfo(kind).max
    steps = np.abs(rows).max(axis=-1, initial=0).astype(np.float32) / largest
    divisors = np.where(steps > 0, steps, 1)[..., None]
    return np.rint(rows / divisors).clip(-largest, largest).astype(kind), steps


# Projections take at most this share of a page.
_MOST_PROJECTIONS = 0.4
# Tokens whose rows show how well all of them compress.
_SAMPLE = 128


@dataclass(frozen=True)
class RowPlan:
    """What of the attention fits into a page.

    Attributes:
        has_projections: E and F of the layers are in the page; without them there are no rows of patches, nor keys.
        num_images: the number of images with rows of patches.
        each_head: rows of each head; else the mean over heads, where they share F.
        ordinary: rows of layers with ordinary attention.
        complete: bytes of a page that leaves nothing out, about.
    """

    has_projections: bool
    num_images: int
    each_head: bool
    ordinary: bool
    complete: int


def plan_rows(seen: Explanation, *, num_images: int, budget: int, other: int) -> RowPlan:
    """What fits into a page of `budget` bytes with `num_images` images like this one, which take `other` bytes each.

    Heads are left out first, then rows of ordinary layers, then rows of the last images.
    """

    sizes = {each: [_size_of_rows(layer, each_head=each) for layer in seen.layers] for each in (True, False)}

    def rows(*, each_head: bool, ordinary: bool) -> float:
        pairs = zip(seen.layers, sizes[each_head])
        return sum(size for layer, size in pairs if ordinary or layer.projection is not None)

    shared = TEXT * sum(_entries(projection, seen) for projection in _distinct(seen))
    left = budget - shared - num_images * other
    complete = ceil(shared + num_images * (other + rows(each_head=True, ordinary=True)))
    if shared > _MOST_PROJECTIONS * budget:
        return RowPlan(False, 0, each_head=False, ordinary=False, complete=complete)
    is_mixed = len({layer.projection is None for layer in seen.layers}) == 2
    choices = [(True, True), (False, True), *([(False, False)] if is_mixed else [])]
    for each_head, ordinary in choices:
        if num_images * rows(each_head=each_head, ordinary=ordinary) <= left:
            return RowPlan(True, num_images, each_head=each_head, ordinary=ordinary, complete=complete)
    for each_head, ordinary in choices[1:]:
        fitting = int(left // max(rows(each_head=each_head, ordinary=ordinary), 1))
        if fitting > 0:
            break
    return RowPlan(True, max(fitting, 0), each_head=each_head, ordinary=ordinary, complete=complete)


def num_rows(layer: LayerAttention, *, each_head: bool) -> int:
    """Rows per token: one for each head, or one where their mean is enough."""
    has_own_maps = layer.projection is not None and layer.projection.num_maps > 1
    return layer.num_heads if each_head or has_own_maps else 1


def pack_projections(pack: Pack, seen: Explanation, *, with_projections: bool = True) -> dict[str, Any]:
    """Append E and F of all layers, each once; returns where they are, and which layer uses which.

    A projection is (M, k, N), or the factors (M, k_h, h) and (M, k_w, w) of a separable one.
    """
    distinct = _distinct(seen) if with_projections else []
    index = {id(projection): number for number, projection in enumerate(distinct)}
    layers = []
    for layer, pair in zip(seen.layers, seen.projections):
        num_prefix = layer.queries.shape[2] - layer.grid_size[0] * layer.grid_size[1]
        used = (None, None) if pair is None or not with_projections else (index[id(pair[0])], index[id(pair[1])])
        layers.append({"heads": layer.num_heads, "prefix": num_prefix, "keys": used[0], "values": used[1]})
    return {"projections": [_pack_projection(pack, each, seen) for each in distinct], "layers": layers}


def pack_attention(pack: Pack, seen: Explanation, plan: RowPlan, *, with_rows: bool) -> list[dict[str, Any]]:
    """Append each layer's attention of what the classifier reads, and that of all tokens; returns where they are.

    "start" is vᵀP̄ of each head, (H, K), or (H, T) if the page has no projections. "tokens" is P̄, (H or 1, T, K), or
    None.
    """
    places = []
    for layer in seen.layers:
        start = weighted_rows(layer, seen.start)
        start = start if plan.has_projections else layer.to_tokens(start)
        place: dict[str, Any] = {"start": pack.add_quantised(_numbers(start)), "tokens": None}
        if with_rows and plan.has_projections and (plan.ordinary or layer.projection is not None):
            place["tokens"] = pack.add_quantised(_token_rows(layer, each_head=plan.each_head))
        places.append(place)
    return places


def _size_of_rows(layer: LayerAttention, *, each_head: bool) -> float:
    """Bytes of a layer's P̄ in a page, from how well a sample of its rows compresses."""
    num_tokens = layer.queries.shape[2]
    sample = torch.linspace(0, num_tokens - 1, min(_SAMPLE, num_tokens), device=layer.queries.device).long()
    pack = Pack()
    pack.add_quantised(_token_rows(layer, each_head=each_head, tokens=sample))
    return len(pack.text()) * num_tokens / len(sample)


@torch.no_grad()
def _token_rows(layer: LayerAttention, *, each_head: bool, tokens: torch.Tensor | slice = slice(None)) -> np.ndarray:
    """P̄ of each head, or the mean over heads, of some or all tokens: (H or 1, T, K)."""

    def by_head(head: int) -> torch.Tensor:
        return torch.cat([block for _, block in layer.matrix(head, rows=tokens).row_blocks()])

    if num_rows(layer, each_head=each_head) > 1:
        return np.stack([_numbers(by_head(head)) for head in range(layer.num_heads)])
    total = by_head(0)
    for head in range(1, layer.num_heads):
        total += by_head(head)
    return _numbers(total / layer.num_heads)[None]


def _pack_projection(pack: Pack, projection: Projection, seen: Explanation) -> dict[str, Any]:
    height, width = seen.layers[0].grid_size
    if isinstance(projection, SeparableProjection):
        factors = remap_axis(projection.weight_h, height), remap_axis(projection.weight_w, width)
        rows, columns = (pack.add(_numbers(factor)) for factor in factors)
        return {"k": projection.k, "maps": projection.num_maps, "rows": rows, "columns": columns}
    dense = dense_rows(projection, (height, width), like=seen.start)
    return {"k": projection.k, "maps": projection.num_maps, "dense": pack.add_quantised(_numbers(dense))}


def _entries(projection: Projection, seen: Explanation) -> int:
    """Bytes of a projection in a pack, about."""
    height, width = seen.layers[0].grid_size
    if isinstance(projection, SeparableProjection):
        return 4 * projection.num_maps * (projection.weight_h.shape[1] * height + projection.weight_w.shape[1] * width)
    return projection.num_maps * projection.k * height * width


def _distinct(seen: Explanation) -> list[Projection]:
    pairs: Sequence[tuple[Projection, Projection]] = [pair for pair in seen.projections if pair is not None]
    return list({id(projection): projection for pair in pairs for projection in pair}.values())


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    numbers: np.ndarray = tensor.detach().float().cpu().numpy()
    return numbers
