"""The equations of Linformer (Wang et al. 2020, arXiv 2006.04768), one head at a time.

    head_h = softmax( Q_h K̄_hᵀ / √d ) V̄_h        (Eq. 7)
    K̄_h = E_h K_h,   V̄_h = F_h V_h              E_h, F_h: k_h × N

Everything fast in this package is tested against this file, forward and every gradient, in float64.

Differs from the paper:
- Prefix tokens (class, registers) are keys of their own, never projected. A projected key stands for N/k patches,
  so beside prefix keys its scores carry the constant log(N/k): a prefix key then weighs as it does in full attention.
- Patches may carry a weight (0 for a masked one); it multiplies keys and values before they are projected.

B batch, P prefix tokens, N patches, T = P + N tokens, D width, H heads, d head width, k projected length.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def linformer_attention(
    x: Tensor,
    *,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    E: Sequence[Tensor],
    F: Sequence[Tensor],
    num_prefix_tokens: int = 0,
    patch_weight: Tensor | None = None,
    prefix_mask: Tensor | None = None,
) -> Tensor:
    """Linformer self-attention of the tokens `x` (B, T, D); returns (B, T, D).

    `qkv_weight` (3D, D) and `qkv_bias` (3D) are laid out as in timm: all queries, all keys, all values, each by head.
    `E[h]` and `F[h]` (k_h, N) belong to head h. `patch_weight` (B, N) scales each patch's key and value.
    `prefix_mask` (B, P) is False where a prefix token may not be attended to.
    """
    B, T, D = x.shape
    H, P = len(E), num_prefix_tokens
    N, d = T - P, D // H
    heads = []
    for h in range(H):
        Q, K, V = (_head_slice(x, qkv_weight, qkv_bias, part, h, d) for part in range(3))
        K_bar = torch.cat([K[:, :P], E[h] @ _weighted(K[:, P:], patch_weight)], dim=1)
        V_bar = torch.cat([V[:, :P], F[h] @ _weighted(V[:, P:], patch_weight)], dim=1)
        scores = Q @ K_bar.transpose(1, 2) / math.sqrt(d)
        if P > 0:
            k = E[h].shape[0]
            bias = torch.zeros(B, 1, P + k, dtype=x.dtype)
            bias[:, :, P:] = math.log(N / k)
            if prefix_mask is not None:
                bias[:, 0, :P].masked_fill_(~prefix_mask, -math.inf)
            scores = scores + bias
        heads.append(scores.softmax(dim=-1) @ V_bar)
    out = torch.cat(heads, dim=-1) @ out_weight.T
    return out if out_bias is None else out + out_bias


def _head_slice(x: Tensor, weight: Tensor, bias: Tensor | None, part: int, head: int, d: int) -> Tensor:
    D = weight.shape[1]
    rows = slice(part * D + head * d, part * D + (head + 1) * d)
    y = x @ weight[rows].T
    return y if bias is None else y + bias[rows]


def _weighted(patches: Tensor, weight: Tensor | None) -> Tensor:
    return patches if weight is None else patches * weight[:, :, None]


def remap(E: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Move the rows of `E` (k, H·W) to another grid by overlap area; returns (k, H'·W').

    Each row is a density over the image, constant on every old patch; a new patch receives the part of each old
    patch's mass that lies inside it, so row sums do not change.
    """
    (h, w), (new_h, new_w) = old_grid, new_grid
    out = torch.zeros(E.shape[0], new_h * new_w, dtype=E.dtype)
    for i in range(new_h):
        for j in range(new_w):
            for a in range(h):
                for b in range(w):
                    share = _overlap(i, new_h, a, h) * h * _overlap(j, new_w, b, w) * w
                    out[:, i * new_w + j] += share * E[:, a * w + b]
    return out


def average_pool_matrix(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """The (k_h·k_w, H·W) matrix that averages the patches of each of k_h × k_w equal cells, by area."""
    (h, w), (k_h, k_w) = grid, cells
    E = torch.zeros(k_h * k_w, h * w, dtype=torch.float64)
    for i in range(k_h):
        for j in range(k_w):
            for a in range(h):
                for b in range(w):
                    E[i * k_w + j, a * w + b] = _overlap(i, k_h, a, h) * k_h * _overlap(j, k_w, b, w) * k_w
    return E


def _overlap(i: int, n: int, j: int, m: int) -> float:
    """Length of the intersection of [i/n, (i+1)/n] and [j/m, (j+1)/m]."""
    return max(0.0, min((i + 1) / n, (j + 1) / m) - max(i / n, j / m))
