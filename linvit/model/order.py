"""The three orders in which Linformer attention can be multiplied out, and which is cheapest.

- **per head**: keys and values of all N tokens, then E and F on them. This is the published order.
- **associative**: E(XWk + 1bᵀ) = (EX)Wk + (E1)bᵀ: project the tokens to k first, then apply Wk and Wv to k rows only.
- **folded**: with few keys, scores are X (Wq K̄ᵀ) and the output is P (V̄ Wo): two products of width K·H. Neither
  queries nor per-head outputs are formed.

All three give the same function. Projections that are not matrices (`maxpool`, `conv`) reduce the tokens, before Wk and
Wv, so they have no per-head order.

D width, N patches, H heads, M maps of a projection (1 or H), k projected length, K = prefix tokens + k keys.
"""

from typing import Literal

from torch import Tensor

from linvit.model.eager import HALF_PRECISIONS, autocast_dtype

Order = Literal["per_head", "associative", "folded"]


def choose_order(
    *,
    dim: int,
    num_heads: int,
    num_keys: int,
    num_patches: int,
    k: int,
    num_maps: int,
    foldable: bool,
    is_matrix: bool = True,
) -> Order:
    """The cheapest order by multiply-adds per patch.

    | order       | keys and values      | queries, attention, output |
    |-------------|----------------------|----------------------------|
    | per head    | 2 D² + 2 D k         | 2 D² + 2 D K               |
    | associative | 2 D k M              | 2 D² + 2 D K               |
    | folded      | 2 D k M              | 2 D K H + 2 D² K / N       |

    The last term is the cost of folding the weights into the keys, once per image. It counts twice, because products
    this small ran at half speed on the CPU where they were measured.
    """
    folding = num_keys * num_heads + 2 * dim * num_keys / num_patches
    if foldable and folding <= dim + num_keys:
        return "folded"
    return "associative" if k * num_maps <= dim + k or not is_matrix else "per_head"


def keeps_scores_on_chip(x: Tensor) -> bool:
    """Whether fused attention of `x` costs almost nothing, as it does in half precision on a GPU.

    Folding does not pay there: the multiply-adds that it saves are not the bottleneck, and it writes scores to memory.
    """
    return x.is_cuda and (autocast_dtype(x) or x.dtype) in HALF_PRECISIONS
