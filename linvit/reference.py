"""The equations of Linformer (Wang et al. 2020, arXiv 2006.04768), one head at a time.

    head_h = softmax( Q_h K̄_hᵀ / √d ) V̄_h        (Eq. 7)
    K̄_h = E_h K_h,   V̄_h = F_h V_h              E_h, F_h: k_h × N

All fast code in this package is tested against this file, forward and every gradient, in float64.

Differs from the paper:
- Prefix tokens (class, registers) are keys of their own and never projected. A projected key stands for N/k patches,
  so beside prefix keys its scores carry the constant log(N/k). A prefix key then weighs as much as in full attention.
- Patches may be absent (masked). Row i then covers the share s_i = Σ_j |E_ij| m_j / Σ_j |E_ij| of its mass, with
  m_j = 1 for the n patches that are present and 0 for the others. Its key is Σ_j E_ij m_j K_j / s_i, and its value
  likewise. The key stands for n s_i / Σ_i s_i patches instead of N/k, and it is hidden if s_i = 0. If E and F differ,
  this number uses the geometric mean of their shares. If an image has no token to attend to, none of its keys is
  hidden.
- The paper's pooling and convolution are applied to the tokens X, before Wk and Wv: K̄_h = reduce(X) Wk_h + b_h.

B batch, P prefix tokens, N patches, T = P + N tokens, D width, H heads, d head width, k projected length.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Pooling:
    """A function that reduces tokens (B, N, D) to (B, k, D), and the share (k, N) of each cell's area per patch."""

    def __init__(self, reduce: Callable[[Tensor], Tensor], area: Tensor) -> None:
        self.reduce, self.area = reduce, area

    def __call__(self, x: Tensor) -> Tensor:
        return self.reduce(x)


# E_h (k, N), or a function that reduces tokens (B, N, D) to (B, k, D); with absent patches it must be a `Pooling`.
Reduction = Tensor | Callable[[Tensor], Tensor]


def linformer_attention(
    x: Tensor,
    *,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    E: Sequence[Reduction],
    F: Sequence[Reduction],
    num_prefix_tokens: int = 0,
    present: Tensor | None = None,
    prefix_mask: Tensor | None = None,
) -> Tensor:
    """Linformer self-attention of the tokens `x` (B, T, D); returns (B, T, D).

    `qkv_weight` (3D, D) and `qkv_bias` (3D) are ordered as in timm: all queries, all keys, all values, each by head.
    `E[h]` and `F[h]` belong to head h. Each is a matrix (k_h, N), or a function that reduces the patch tokens (B, N, D)
    to (B, k_h, D) and itself leaves absent ones out. `present` (B, N) is False for absent patches. `prefix_mask` (B, P)
    is False where a prefix token may not be attended to.
    """
    B, T, D = x.shape
    H, P = len(E), num_prefix_tokens
    N, d = T - P, D // H
    heads = []
    for h in range(H):
        Wq, Wk, Wv = (_head_layer(qkv_weight, qkv_bias, part, h, d) for part in range(3))
        Q = _apply(Wq, x)
        K_bar = torch.cat([_apply(Wk, x[:, :P]), _reduced(E[h], Wk, x[:, P:], present)], dim=1)
        V_bar = torch.cat([_apply(Wv, x[:, :P]), _reduced(F[h], Wv, x[:, P:], present)], dim=1)
        scores = Q @ K_bar.transpose(1, 2) / math.sqrt(d)
        # The number of tokens that each key stands for.
        counts = torch.ones(B, P, dtype=x.dtype) if prefix_mask is None else prefix_mask.to(x.dtype)
        if present is None:
            k = K_bar.shape[1] - P
            projected = torch.full((B, k), N / k, dtype=x.dtype)
        else:
            projected = _patches_per_key(E[h], F[h], present)
        if P > 0 or present is not None:
            scores = scores + _log_counts(torch.cat([counts, projected], dim=1))[:, None]
        heads.append(scores.softmax(dim=-1) @ V_bar)
    out = torch.cat(heads, dim=-1) @ out_weight.T
    return out if out_bias is None else out + out_bias


def rotary_linformer_attention(
    x: Tensor,
    *,
    q: Sequence[tuple[Tensor, Tensor | None]],
    k: Sequence[tuple[Tensor, Tensor | None]],
    v: Sequence[tuple[Tensor, Tensor | None]],
    out_weight: Tensor,
    out_bias: Tensor | None,
    E: Sequence[Reduction],
    F: Sequence[Reduction],
    R: Tensor,
    rotate: str = "keys",
    normalise: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    gate: Tensor | None = None,
    num_prefix_tokens: int = 0,
    present: Tensor | None = None,
) -> Tensor:
    """Linformer self-attention with rotary embedding of the tokens `x` (B, T, D); returns (B, T, D).

    The query of patch j is R_j N(x_j Wq). Keys are rotated before they are projected, or rows afterwards:

        "keys"   K̄_i = Σ_j E_ij R_j N(x_j Wk)
        "rows"   K̄_i = R̄_i N(Σ_j E_ij x_j Wk)        R̄_i = Σ_j |E_ij| R_j / Σ_j |E_ij|

    `q[h]`, `k[h]`, `v[h]` are weight (d, D) and bias of head h. `R` (H, N, d, d) is the rotation of each patch. Prefix
    tokens are not rotated. `normalise` is N for queries and for keys. The heads' outputs, side by side, go through
    `norm` and are multiplied by `gate` (B, T, D) before the output layer.
    """
    H, P = len(E), num_prefix_tokens
    N, d = x.shape[1] - P, q[0][0].shape[0]
    normalise_q, normalise_k = normalise or (lambda y: y, lambda y: y)
    heads = []
    for h in range(H):
        Q = _rotated(normalise_q(_apply(q[h], x)), R[h], P)
        if rotate == "keys":
            matrix = E[h]
            assert isinstance(matrix, Tensor)
            K = _rotated(normalise_k(_apply(k[h], x)), R[h], P)
            K_bar = torch.cat([K[:, :P], _reduced_rows(matrix, K[:, P:], present)], dim=1)
        else:
            mass = _mass(E[h])
            mass = mass[None] if present is None else mass * present[:, None]
            full = mass.sum(2)[:, :, None, None]
            mean = torch.einsum("bkn,nij->bkij", mass, R[h]) / torch.where(full == 0, 1, full)
            rows = normalise_k(_reduced(E[h], k[h], x[:, P:], present))
            rows = torch.einsum("bkij,bkj->bki", mean.expand(len(x), -1, -1, -1), rows)
            K_bar = torch.cat([normalise_k(_apply(k[h], x[:, :P])), rows], dim=1)
        V_bar = torch.cat([_apply(v[h], x[:, :P]), _reduced(F[h], v[h], x[:, P:], present)], dim=1)
        counts = torch.full((len(x), K_bar.shape[1] - P), N / (K_bar.shape[1] - P), dtype=x.dtype)
        if present is not None:
            counts = _patches_per_key(E[h], F[h], present)
        scores = Q @ K_bar.transpose(1, 2) / math.sqrt(d)
        if P > 0 or present is not None:
            scores = scores + _log_counts(torch.cat([torch.ones(len(x), P, dtype=x.dtype), counts], dim=1))[:, None]
        heads.append(scores.softmax(dim=-1) @ V_bar)
    out = torch.cat(heads, dim=-1)
    out = out if norm is None else norm(out)
    out = (out if gate is None else out * gate) @ out_weight.T
    return out if out_bias is None else out + out_bias


def _rotated(y: Tensor, R: Tensor, num_prefix_tokens: int) -> Tensor:
    prefix, patches = y[:, :num_prefix_tokens], y[:, num_prefix_tokens:]
    return torch.cat([prefix, torch.einsum("nij,bnj->bni", R, patches)], dim=1)


def _head_layer(weight: Tensor, bias: Tensor | None, part: int, head: int, d: int) -> tuple[Tensor, Tensor | None]:
    D = weight.shape[1]
    rows = slice(part * D + head * d, part * D + (head + 1) * d)
    return weight[rows], None if bias is None else bias[rows]


def _apply(layer: tuple[Tensor, Tensor | None], x: Tensor) -> Tensor:
    weight, bias = layer
    y = x @ weight.T
    return y if bias is None else y + bias


def _reduced(
    reduction: Reduction, layer: tuple[Tensor, Tensor | None], patches: Tensor, present: Tensor | None
) -> Tensor:
    if not isinstance(reduction, Tensor):
        return _apply(layer, reduction(patches))
    return _reduced_rows(reduction, _apply(layer, patches), present)


def _reduced_rows(reduction: Tensor, y: Tensor, present: Tensor | None) -> Tensor:
    if present is None:
        return reduction @ y
    share = _present_share(reduction, present)
    return (reduction @ (y * present[:, :, None])) / torch.where(share == 0, 1, share)[:, :, None]


def _present_share(reduction: Reduction, present: Tensor) -> Tensor:
    """The share of each row's absolute mass, or of each cell's area, on present patches (B, N): (B, k)."""
    mass = _mass(reduction)
    full = mass.sum(dim=1)
    return (present.to(mass) @ mass.T) / torch.where(full == 0, 1, full)


def _mass(reduction: Reduction) -> Tensor:
    """|E|, or the share of each cell's area per patch: (k, N)."""
    assert isinstance(reduction, Tensor | Pooling)
    return reduction.area if isinstance(reduction, Pooling) else reduction.abs()


def _patches_per_key(E: Reduction, F: Reduction, present: Tensor) -> Tensor:
    """The number of present patches (B, N) that each projected key stands for: (B, k)."""
    product = _present_share(E, present) * _present_share(F, present)
    share = torch.where(product == 0, 0, torch.where(product == 0, 1, product).sqrt())
    live = share.sum(dim=1, keepdim=True)
    return share * present.sum(dim=1, keepdim=True) / torch.where(live == 0, 1, live)


def _log_counts(counts: Tensor) -> Tensor:
    """log of the numbers of tokens (B, K), -∞ for a key that stands for none; zeros for an image without any key."""
    log = torch.where(counts == 0, -math.inf, torch.where(counts == 0, 1, counts).log())
    return torch.where((counts == 0).all(dim=1, keepdim=True), 0, log)


def local_branch(x: Tensor, grid: tuple[int, int], *, weight: Tensor, present: Tensor | None = None) -> Tensor:
    """Each channel of patches (B, H·W, D) convolved with its own kernel, `weight` (D, s, s) with odd s: (B, H·W, D).

    Patches outside the grid, and those that are not `present` (B, H·W), are zeros. The result is added to the
    attention's output.
    """
    (h, w), half = grid, weight.shape[1] // 2
    if present is not None:
        x = torch.where(present[:, :, None], x, 0)
    out = torch.zeros_like(x)
    for i in range(h):
        for j in range(w):
            for a in range(max(i - half, 0), min(i + half + 1, h)):
                for b in range(max(j - half, 0), min(j + half + 1, w)):
                    out[:, i * w + j] += weight[:, a - i + half, b - j + half] * x[:, a * w + b]
    return out


def remap(E: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Move the rows of `E` (k, H·W) to another grid by overlap area; returns (k, H'·W').

    Each row is a density over the image, constant on every old patch. A new patch receives the part of each old patch's
    mass that lies inside it, so row sums do not change.
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
    """The (k_h·k_w, H·W) matrix that averages the patches of each of k_h × k_w equal cells by area."""
    rows, columns = (
        torch.tensor([[_overlap(i, k, a, n) * k for a in range(n)] for i in range(k)], dtype=torch.float64)
        for n, k in zip(grid, cells)
    )
    return torch.kron(rows, columns)


def max_pool(x: Tensor, grid: tuple[int, int], cells: tuple[int, int], present: Tensor | None = None) -> Tensor:
    """The maximum of each channel over all patches that overlap each of k_h × k_w cells: (B, H·W, C) → (B, k, C).

    Only patches that are `present` (B, H·W) count; a cell without one gives zeros.
    """
    B, _, C = x.shape
    touches = average_pool_matrix(grid, cells) > 0
    out = torch.zeros(B, len(touches), C, dtype=x.dtype)
    for b in range(B):
        for i in range(len(touches)):
            counted = touches[i] if present is None else touches[i] & present[b]
            if counted.any():
                out[b, i] = x[b, counted].max(dim=0).values
    return out


def depthwise_conv(
    x: Tensor,
    grid: tuple[int, int],
    cells: tuple[int, int],
    *,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    present: Tensor | None = None,
) -> Tensor:
    """A kernel per channel on each of k_h × k_w cells, then layer norm over channels: (B, H·W, C) → (B, k, C).

    `weight` (C, s_h, s_w) has one entry for each of s_h × s_w pieces of a cell, which multiplies the image's mean on
    that piece. `gamma` and `beta` (C) belong to the layer norm. Patches that are not `present` (B, H·W) are zeros.
    """
    (k_h, k_w), (C, s_h, s_w) = cells, weight.shape
    if present is not None:
        x = torch.where(present[:, :, None], x, 0)
    pieces = (average_pool_matrix(grid, (k_h * s_h, k_w * s_w)) @ x).reshape(len(x), k_h, s_h, k_w, s_w, C)
    out = torch.zeros(len(x), k_h, k_w, C, dtype=x.dtype)
    for p in range(s_h):
        for q in range(s_w):
            out = out + weight[:, p, q] * pieces[:, :, p, :, q]
    out = out.reshape(len(x), k_h * k_w, C)
    centred = out - out.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * gamma + beta


def dct_modes(k: int, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """The k lowest cosine modes (u, v) of an H × W grid, sorted by (u/H)² + (v/W)², then by u."""
    H, W = grid
    return sorted(
        ((u, v) for u in range(H) for v in range(W)), key=lambda uv: ((uv[0] * W) ** 2 + (uv[1] * H) ** 2, uv)
    )[:k]


def dct_matrix(grid: tuple[int, int], modes: Sequence[tuple[int, int]]) -> Tensor:
    """Integrals of c_u c_v cos(πut) cos(πvs) over every patch of the unit square, c = 1 for 0, else √2: (k, H·W)."""
    H, W = grid
    E = torch.zeros(len(modes), H, W, dtype=torch.float64)
    for row, (u, v) in enumerate(modes):
        for i in range(H):
            for j in range(W):
                E[row, i, j] = _cosine_integral(u, i / H, (i + 1) / H) * _cosine_integral(v, j / W, (j + 1) / W)
    return E.flatten(1)


def _cosine_integral(u: int, start: float, stop: float) -> float:
    """∫ c_u cos(πut) dt from `start` to `stop`."""
    if u == 0:
        return stop - start
    return math.sqrt(2) * (math.sin(math.pi * u * stop) - math.sin(math.pi * u * start)) / (math.pi * u)


def _overlap(i: int, n: int, j: int, m: int) -> float:
    """Length of the intersection of [i/n, (i+1)/n] and [j/m, (j+1)/m]."""
    return max(0.0, min((i + 1) / n, (j + 1) / m) - max(i / n, j / m))
