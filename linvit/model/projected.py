"""The part that all Linformer attention layers share: E and F, prefix tokens, the bias of the keys, and the softmax.

B batch, P prefix tokens, T tokens, D width, H heads, d head width, M maps of a projection (1 or H), k projected length,
K = P + k keys.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.model.kernels import Order, in_forward_mode, split_attention
from linvit.model.local import LocalConv
from linvit.model.projections import IdentityProjection, Projection
from linvit.model.sharing import check_pair
from linvit.model.tokens import Patches

if TYPE_CHECKING:
    # timm has no types, so a class of it has every attribute.
    from timm.layers import Attention as _Layer
else:
    _Layer = nn.Module


class ProjectedAttention(_Layer):
    """Base of attention layers whose keys and values are projected from N patches to k.

    A class inherits from this and from one of timm's attention layers, calls `start_unprojected` when it is built, and
    computes queries, keys and values. Without projections it is timm's layer.

    Attributes:
        num_prefix_tokens: number P of tokens in front of the patches, which are never projected.
        key_projection: E; None for ordinary attention.
        value_projection: F; None uses E for values too.
        local: a convolution of the patch tokens that is added to the attention's output, or None.
        order: order of multiplication; None lets the layer choose. Tests and benchmarks set it.
        query_chunks: see `split_attention`; None chooses by size.
    """

    key_projection: Projection | None
    value_projection: Projection | None
    local: LocalConv | None

    def start_unprojected(self, num_prefix_tokens: int) -> None:
        """Prepare a new layer of timm's for projections; it has none yet and computes ordinary attention."""
        self.num_prefix_tokens = num_prefix_tokens
        self.order: Order | None = None
        self.query_chunks: int | None = None
        self.local = None
        self.set_projections(None)

    def set_projections(self, key_projection: Projection | None, value_projection: Projection | None = None) -> None:
        """Set E and F. None for F shares E between keys and values, None for both gives ordinary attention.

        Raises ValueError if they do not match: maps for a different number of heads, different lengths or grids, or
        only one of them is a matrix.
        """
        check_pair(key_projection, value_projection, num_heads=self.num_heads)
        self.key_projection = key_projection
        self.value_projection = value_projection

    def projections(self) -> tuple[Projection, Projection] | None:
        """E and F, or None if this layer is ordinary attention."""
        key = self.key_projection
        if key is None or isinstance(key, IdentityProjection):
            return None
        return key, key if self.value_projection is None else self.value_projection

    def _refuse_causal(self, is_causal: bool) -> None:
        if is_causal and self.projections() is not None:
            raise ValueError("a projected key mixes all positions, so Linformer attention cannot be causal")
        if is_causal and self.local is not None:
            raise ValueError("the convolution beside attention sees later patches, so this layer cannot be causal")

    def _no_per_head_order(self, projection: Projection, readable: bool) -> ValueError:
        return ValueError(
            f"projection {projection.kind!r} reduces tokens before Wk and Wv, so it has no per_head order: "
            + (
                "use associative or folded"
                if readable
                else "remove adapters, hooks and quantised weights from qkv, or use another kind of projection"
            )
        )

    def _with_local(self, out: Tensor, x: Tensor, patches: Patches, tokens: Tensor) -> Tensor:
        """The outputs of some tokens, with those of the convolution beside attention."""
        if self.local is None:
            return out
        added = F.pad(self.local(x, patches), (0, 0, self.num_prefix_tokens, 0))
        return out + added[:, tokens]

    def _add_to_patches(self, out: Tensor, added: Tensor) -> Tensor:
        if self.num_prefix_tokens == 0:
            return out + added
        prefix, patches = out.split([self.num_prefix_tokens, added.shape[1]], dim=1)
        return torch.cat([prefix, patches + added], dim=1)

    def _rows(
        self,
        prefix: Tensor,
        on_grid: Tensor,
        projection: Projection,
        share: Tensor | None,
        patches: Patches,
        *,
        has_bias: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The rows that Wk and Wv are applied to after projecting, (B, M, K, D), and the factors of a bias.

        Args:
            prefix, on_grid: prefix tokens (B, 1, P, D), and patches on the full grid (B, 1, N, D).
            projection, share: E, and the present share of its rows.
        """
        reduced = patches.project(projection, on_grid, share)  # (B, M, k, D)
        rows = self._join(prefix.expand(-1, reduced.shape[1], -1, -1), reduced)
        if not has_bias:
            return rows, None
        row_sums = patches.row_sums(projection, on_grid, share)  # (B or 1, M, k, 1)
        if self.num_prefix_tokens > 0:
            row_sums = F.pad(row_sums, (0, 0, self.num_prefix_tokens, 0), value=1.0)
        return rows, row_sums

    def _map_rows(
        self, rows: Tensor, row_sums: Tensor | None, weight: Tensor, bias: Tensor | None, parts: int = 1
    ) -> tuple[Tensor, ...]:
        """(EX)W + (E1)bᵀ for Wk, Wv, or both one after the other: `parts` tensors (B, H, K, d)."""
        if rows.shape[1] == 1:
            y = F.linear(rows, weight).unflatten(3, (parts, -1, self.head_dim))  # (B, 1, K, parts, H, d)
            y = y.squeeze(1).permute(2, 0, 3, 1, 4)
        else:
            y = rows @ weight.unflatten(0, (parts, 1, -1, self.head_dim)).mT  # (parts, B, H, K, d)
        if bias is not None and row_sums is not None:
            # In the precision of the products, since the result goes into fused attention.
            y = torch.addcmul(y, row_sums.to(y.dtype), bias.to(y.dtype).unflatten(0, (parts, 1, -1, 1, self.head_dim)))
        return y.unbind(0)

    def _softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        # Fused attention on a CPU has no forward-mode derivatives.
        if self.fused_attn and not in_forward_mode():
            dropout = self.attn_drop.p if self.training else 0.0
            bias = None if bias is None else bias.to(q.dtype)
            return split_attention(q, k, v, bias=bias, dropout=dropout, chunks=self.query_chunks)
        scores = (q * self.scale) @ k.mT
        if bias is not None:
            scores = scores + bias
        return self.attn_drop(scores.softmax(dim=-1)) @ v

    def _key_bias(self, x: Tensor, lengths: list[int], patches: Patches) -> Tensor | None:
        """The bias added to the scores of each key (B or 1, H or 1, 1, K), or None if there is none."""
        prefix, longest = self.num_prefix_tokens, max(lengths)
        per_image = patches.log_patches_per_key()
        if per_image is not None:
            bias = F.pad(per_image, (prefix, 0))
            if patches.prefix_mask is not None:
                hidden = F.pad(~patches.prefix_mask, (0, longest))[:, None, None]
                bias = bias.masked_fill(hidden, -math.inf)
            # With every key hidden, softmax would be 0/0.
            return bias.masked_fill((bias == -math.inf).all(dim=-1, keepdim=True), 0.0).to(x.dtype)
        if prefix == 0 and min(lengths) == longest:
            return None
        rows = []
        for k in lengths[:1] if min(lengths) == longest else lengths:
            row = x.new_full((prefix + longest,), math.log(patches.num_present / k) if prefix else 0.0)
            row[:prefix] = 0.0
            if k < longest:
                row[prefix + k :] = -math.inf
            rows.append(row)
        return torch.stack(rows)[None, :, None] if len(rows) > 1 else rows[0].view(1, 1, 1, -1)

    def _split_prefix(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Split (B, M, T, C) into prefix tokens and patches. Without prefix tokens no gradient is copied."""
        if self.num_prefix_tokens == 0:
            return y[:, :, :0].detach(), y
        prefix, patches = y.split([self.num_prefix_tokens, y.shape[2] - self.num_prefix_tokens], dim=2)
        return prefix, patches

    def _join(self, prefix: Tensor, reduced: Tensor) -> Tensor:
        """Prefix tokens (B, M, P, C) and projected patches (B, M, k, C), as (B, M, K, C)."""
        return torch.cat([prefix, reduced], dim=2) if self.num_prefix_tokens > 0 else reduced
