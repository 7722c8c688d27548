"""Linformer self-attention (Wang et al. 2020, arXiv 2006.04768, Eq. 7) for patch tokens on a grid.

    head = softmax( (X Wq) (E X Wk)ᵀ / √d ) (F X Wv)        E, F: k × N        O(N k)

The same function in three orders of multiplication; `choose_order` takes the cheapest.

- **per head**: keys and values of all N tokens, then E and F on them. What is published.
- **associative**: E(XWk + 1bᵀ) = (EX)Wk + (E1)bᵀ: project the tokens down to k first, apply Wk and Wv to k rows only.
- **folded**: with few keys, scores are X (Wq K̄ᵀ) and the output is P (V̄ Wo): two products of width K·H, no queries and
  no per-head outputs are ever formed.

Differs from the paper: prefix tokens (class, registers) are keys of their own and never projected. A projected key
stands for N/k patches, so beside prefix keys its scores carry log(N/k), and a prefix key weighs as in full attention.
Query and key normalisation (`qk_norm`) act on the projected keys.

B batch, P prefix tokens, N patches, T = P + N tokens, D width, H heads, d head width, M maps of a projection (1 or H),
k projected length, K = P + k keys.
"""

import math
from typing import Literal, NamedTuple

import torch
from timm.layers import Attention
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.projections import GridSize, IdentityProjection, Projection

Order = Literal["per_head", "associative", "folded"]


class TokenLayout(NamedTuple):
    """Where a batch's tokens lie when they are not simply the model's whole grid; travels in the mask's place."""

    grid_size: GridSize
    # Indices of the patches that are present (B, n), each image its own; None: all of them, in order.
    kept: Tensor | None = None
    attn_mask: Tensor | None = None


def choose_order(*, dim: int, num_heads: int, num_keys: int, k: int, num_maps: int, foldable: bool) -> Order:
    """The cheapest order by multiply-adds per patch, for k far below N.

    | order       | keys and values      | queries, attention, output |
    |-------------|----------------------|----------------------------|
    | per head    | 2 D² + 2 D k         | 2 D² + 2 D K               |
    | associative | 2 D k M              | 2 D² + 2 D K               |
    | folded      | 2 D k M              | 2 D K H                    |

    Folding stops at K·H = D rather than at D + K: its products are narrower and its softmax is not fused.
    """
    if foldable and num_keys * num_heads <= dim:
        return "folded"
    return "associative" if k * num_maps <= dim + k else "per_head"


@register_notrace_module
class LinformerAttention(Attention):
    """Self-attention whose keys and values are projected from N patches to k; a drop-in for timm's `Attention`.

    Args:
        dim: width D of the tokens, (B, T, D) in and out.
        num_heads: H.
        qkv_bias, qk_norm, scale_norm, proj_bias, attn_drop, proj_drop, norm_layer: as in timm's `Attention`.
        num_prefix_tokens: P, tokens in front of the patches that are never projected.
        key_projection: E, from `build_projection`; None makes this ordinary attention.
        value_projection: F; None uses E for values too (the paper's key-value sharing).

    `attn_mask` may be a boolean key-padding mask (B or 1, 1, 1, T), True where a token may be attended to; it is
    applied before projecting. Causal and every other mask raise ValueError: a projected key is a mixture of all
    positions. An ordinary attention layer takes whatever `scaled_dot_product_attention` takes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        num_prefix_tokens: int = 0,
        key_projection: Projection | None = None,
        value_projection: Projection | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            device=device,
            dtype=dtype,
        )
        self.num_prefix_tokens = num_prefix_tokens
        self.foldable = not (qk_norm or scale_norm)
        # None: `choose_order` decides. Tests and benchmarks set it.
        self.order: Order | None = None
        self.set_projections(key_projection, value_projection)

    def set_projections(self, key_projection: Projection | None, value_projection: Projection | None = None) -> None:
        """E and F; None for F shares E between keys and values, None for both is ordinary attention."""
        self.key_projection = key_projection
        self.value_projection = value_projection

    def projections(self) -> tuple[Projection, Projection] | None:
        """E and F, or None where this layer is ordinary attention."""
        key = self.key_projection
        if key is None or isinstance(key, IdentityProjection):
            return None
        return key, key if self.value_projection is None else self.value_projection

    def forward(self, x: Tensor, attn_mask: Tensor | TokenLayout | None = None, is_causal: bool = False) -> Tensor:
        layout = attn_mask if isinstance(attn_mask, TokenLayout) else None
        mask = attn_mask.attn_mask if isinstance(attn_mask, TokenLayout) else attn_mask
        projections = self.projections()
        if projections is None:
            return super().forward(x, attn_mask=mask, is_causal=is_causal)
        if is_causal:
            raise ValueError("a projected key mixes all positions, so Linformer attention cannot be causal")
        return self._attend(x, *projections, self._read_patches(x, projections[0], layout, mask))

    def _attend(self, x: Tensor, key_proj: Projection, value_proj: Projection, patches: "_Patches") -> Tensor:
        num_maps = max(key_proj.num_maps, value_proj.num_maps)
        order = self.order or choose_order(
            dim=x.shape[-1],
            num_heads=self.num_heads,
            num_keys=self.num_prefix_tokens + key_proj.k,
            k=key_proj.k,
            num_maps=num_maps,
            foldable=self.foldable,
        )
        if order == "per_head":
            queries, keys, values = self._per_head(x, key_proj, value_proj, patches)
        else:
            queries = None
            keys, values = self._associative(x, key_proj, value_proj, patches)
        keys = self.k_norm(keys)  # (B, H, K, d)
        bias = self._key_bias(x, key_proj.lengths, patches)
        if order == "folded":
            return self.proj_drop(self._folded(x, keys, values, bias))
        if queries is None:
            weight, q_bias = self._part(0)
            queries = self._split_heads(F.linear(x, weight, q_bias))
        out = self._softmax_attention(self.q_norm(queries), keys, values, bias)
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(out))

    def _per_head(
        self, x: Tensor, key_proj: Projection, value_proj: Projection, patches: "_Patches"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, d), projected keys and values (B, H, K, d), projecting after Wk and Wv."""
        prefix = self.num_prefix_tokens
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        keys, values = (
            torch.cat([y[:, :, :prefix], proj(patches.place(y[:, :, prefix:]), patches.grid_size)], dim=2)
            for y, proj in ((k, key_proj), (v, value_proj))
        )
        return q, keys, values

    def _associative(
        self, x: Tensor, key_proj: Projection, value_proj: Projection, patches: "_Patches"
    ) -> tuple[Tensor, Tensor]:
        """Projected keys and values (B, H, K, d), projecting before Wk and Wv: (EX)Wk + (E1)bᵀ."""
        prefix, on_grid = (
            x[:, None, : self.num_prefix_tokens],
            patches.place(x[:, None, self.num_prefix_tokens :]),
        )
        reduced = key_proj(on_grid, patches.grid_size)  # (B, M, k, D)
        row_sums = key_proj(patches.place_ones(on_grid), patches.grid_size)  # (B or 1, M, k, 1)
        keys = self._apply_part(1, prefix, reduced, row_sums)
        if value_proj is not key_proj:
            reduced = value_proj(on_grid, patches.grid_size)
            row_sums = value_proj(patches.place_ones(on_grid), patches.grid_size)
        return keys, self._apply_part(2, prefix, reduced, row_sums)

    def _apply_part(self, part: int, prefix: Tensor, reduced: Tensor, row_sums: Tensor) -> Tensor:
        """Wk or Wv on prefix tokens (B, 1, P, D) and projected patches (B, M, k, D): (B, H, P + k, d)."""
        weight, bias = self._part(part)
        num_maps = reduced.shape[1]
        rows = torch.cat([prefix.expand(-1, num_maps, -1, -1), reduced], dim=2)
        if num_maps == 1:
            y = self._split_heads(F.linear(rows.squeeze(1), weight))
        else:
            y = rows @ weight.unflatten(0, (self.num_heads, -1)).mT
        if bias is None:
            return y
        prefix_sums = row_sums.new_ones(*row_sums.shape[:2], prefix.shape[2], 1)
        return y + torch.cat([prefix_sums, row_sums], dim=2) * bias.unflatten(0, (self.num_heads, 1, -1))

    def _folded(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(X (Wq K̄ᵀ/√d)) (V̄ Wo), softmax within each head's keys: no queries are formed."""
        weight, q_bias = self._part(0)
        keys = keys * self.scale
        offset = keys.new_zeros(1, 1, 1, keys.shape[2]) if bias is None else bias
        if q_bias is not None:
            offset = offset + (keys @ q_bias.unflatten(0, (self.num_heads, -1, 1))).mT  # (B, H, 1, K)
        offset = offset.expand(x.shape[0], self.num_heads, 1, -1).flatten(1)[:, None]  # (B, 1, H·K)
        score_weight = (keys @ weight.unflatten(0, (self.num_heads, -1))).flatten(1, 2)  # (B, H·K, D)
        out_weight = self.proj.weight.unflatten(1, (self.num_heads, -1)).permute(1, 2, 0)  # (H, d, D)
        value_weight = (values @ out_weight).flatten(1, 2)  # (B, H·K, D)
        scores = torch.baddbmm(offset.to(score_weight.dtype), x, score_weight.mT)
        attn = self.attn_drop(scores.unflatten(2, (self.num_heads, -1)).softmax(dim=-1)).flatten(2)
        out = attn @ value_weight if self.proj.bias is None else torch.baddbmm(self.proj.bias, attn, value_weight)
        return out

    def _softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            mask = None if bias is None else bias.to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        scores = (q * self.scale) @ k.mT
        if bias is not None:
            scores = scores + bias
        return self.attn_drop(scores.softmax(dim=-1)) @ v

    def _key_bias(self, x: Tensor, lengths: list[int], patches: "_Patches") -> Tensor | None:
        """What is added to the scores of each key: (B or 1, H or 1, 1, K), None where that is nothing."""
        prefix, longest = self.num_prefix_tokens, max(lengths)
        if prefix == 0 and min(lengths) == longest:
            return None
        uniform = min(lengths) == longest
        rows = []
        for k in lengths[:1] if uniform else lengths:
            row = x.new_full((prefix + longest,), math.log(patches.num_present / k) if prefix else 0.0)
            row[:prefix] = 0.0
            row[prefix + k :] = -math.inf
            rows.append(row)
        bias = torch.stack(rows)[None, :, None]
        if patches.prefix_mask is not None:
            hidden = F.pad(~patches.prefix_mask, (0, longest))[:, None, None]
            bias = bias.masked_fill(hidden, -math.inf)
        return bias

    def _read_patches(
        self, x: Tensor, projection: Projection, layout: TokenLayout | None, mask: Tensor | None
    ) -> "_Patches":
        present = x.shape[1] - self.num_prefix_tokens
        own_grid = projection.grid_size
        grid_size = own_grid if layout is None else layout.grid_size
        num_patches = grid_size[0] * grid_size[1]
        kept = None if layout is None else layout.kept
        if kept is None and present != num_patches:
            raise ValueError(
                f"{present} patch tokens do not fill the {grid_size[0]}×{grid_size[1]} grid of this attention layer: "
                f"call set_input_size(), or build the model with dynamic_img_size=True"
            )
        if grid_size != own_grid:
            projection.check_grid_size(grid_size)
        weight, prefix_mask = None, None
        if mask is not None:
            prefix_mask, patch_mask = _split_key_padding_mask(mask, x, self.num_prefix_tokens)
            weight = patch_mask.to(x.dtype)
        return _Patches(
            grid_size=None if grid_size == own_grid else grid_size,
            num_patches=num_patches,
            num_present=present,
            kept=kept,
            weight=weight,
            prefix_mask=prefix_mask if self.num_prefix_tokens else None,
        )

    def _part(self, part: int) -> tuple[Tensor, Tensor | None]:
        """Weight (D, D) and bias (D) of queries, keys or values: part 0, 1 or 2."""
        bias = self.qkv.bias
        return self.qkv.weight.chunk(3)[part], None if bias is None else bias.chunk(3)[part]

    def _split_heads(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def __prepare_scriptable__(self) -> nn.Module:
        from linvit.scripting import ScriptableAttention

        return ScriptableAttention(self)


class _Patches(NamedTuple):
    """The patches of one batch: where they lie, which are there, and with what weight."""

    # None: the projection's own grid.
    grid_size: GridSize | None
    num_patches: int
    num_present: int
    kept: Tensor | None
    weight: Tensor | None
    prefix_mask: Tensor | None

    def place(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, M, n, C) on the whole grid (B, M, N, C), weighted; dropped ones leave zeros."""
        if self.weight is not None:
            tokens = tokens * self.weight[:, None, :, None]
        if self.kept is None:
            return tokens
        # The kept patches stand for all: on average the projection is that of the whole image.
        tokens = tokens * (self.num_patches / self.num_present)
        index = self.kept[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3])
        return tokens.new_zeros(*tokens.shape[:2], self.num_patches, tokens.shape[3]).scatter(2, index, tokens)

    def place_ones(self, like: Tensor) -> Tensor:
        """What `place` makes of tokens that are all one: (B or 1, 1, N, 1)."""
        batch = 1 if self.weight is None and self.kept is None else like.shape[0]
        return self.place(like.new_ones(batch, 1, self.num_present, 1))


def _split_key_padding_mask(mask: Tensor, x: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """The prefix (B, P) and patch (B, n) parts of a boolean mask (B or 1, 1, 1, T)."""
    batch, tokens = x.shape[:2]
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1:] == (1, 1, tokens)
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"Linformer attention takes a boolean key-padding mask of shape ({batch}, 1, 1, {tokens}), True where a "
            f"token may be attended to; this mask is {mask.dtype} of shape {tuple(mask.shape)}. Masks that differ "
            f"between queries cannot be applied to projected keys"
        )
    rows = mask[:, 0, 0].expand(batch, -1)
    return rows[:, :num_prefix_tokens], rows[:, num_prefix_tokens:]
