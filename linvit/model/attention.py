"""Linformer self-attention (Wang et al. 2020, arXiv 2006.04768, Eq. 7) for patch tokens on a grid.

    head = softmax( (X Wq) (E X Wk)ᵀ / √d ) (F X Wv)        E, F: k × N        O(N k)

The layer computes this in one of three orders of multiplication; `linvit.model.kernels` describes them.

Differs from the paper: prefix tokens (class, registers) are keys of their own and never projected. A projected key
stands for N/k patches, so with prefix keys log(N/k) is added to its scores. A prefix key then weighs as much as in full
attention.
Query and key normalisation (`qk_norm`) act on the projected keys.

B batch, P prefix tokens, N patches, T = P + N tokens, D width, H heads, d head width, M maps of a projection (1 or H),
k projected length, K = P + k keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.layers import Attention
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.model.kernels import (
    Order,
    apply_in_chunks,
    autocast_dtype,
    cast_once,
    choose_order,
    is_plain_linear,
    keeps_scores_on_chip,
    runs_in_chunks,
)
from linvit.model.projected import ProjectedAttention
from linvit.model.projections import MatrixProjection, Projection
from linvit.model.scripted import ScriptableAttention
from linvit.model.tokens import Patches, TokenLayout, find_patches, read_patches

# Tokens × width of one chunk on a CPU: 2 MiB in single precision.
CHUNK_ELEMENTS = 2**19

# Maps tokens (b, t, D), and the images of the batch that they belong to, to outputs (b, t, D).
Attend = Callable[[Tensor, slice], Tensor]


@register_notrace_module
class LinformerAttention(ProjectedAttention, Attention):
    """Self-attention whose keys and values are projected from N patches to k; a drop-in for timm's `Attention`.

    Arguments that are not listed are those of timm's class.

    Args:
        dim: width D of the tokens; inputs and outputs are (B, T, D).
        num_heads: number of heads H.
        num_prefix_tokens: number P of tokens in front of the patches, which are never projected.
        key_projection: E, from `build_projection`; None gives ordinary attention.
        value_projection: F; None uses E for values too (the paper's key-value sharing).

    With a `LocalConv` as its `local`, the layer adds that convolution of the patch tokens to the attention's output.

    `attn_mask` may be a boolean key-padding mask (B or 1, 1, 1, T), True where a token may be attended to. It is
    applied before projecting, and a projected key that covers no present patch is ignored; `linvit.model.tokens` has
    the rule. For `avgpool`, `maxpool` and `conv` the mask is exact, to rounding, if padding fills whole rows or columns
    of cells: a masked image gives the same result as its crop with cells of the same size. It is approximate if padding
    cuts cells, and for `linear`, `separable`, `dct` and `random`, whose rows reach over the padding: they are rescaled
    from the patches that are present. An ordinary attention layer accepts every mask that
    `scaled_dot_product_attention` accepts.

    `layout` describes where the tokens lie if they do not fill the projections' own grid: on another grid, or only
    some of the patches.

    Raises ValueError for E and F that do not match. A layer with projections also raises it for every other mask, for
    `is_causal` (a projected key mixes all positions), and for patches that do not fill the grid.
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
        self.foldable = not (qk_norm or scale_norm)
        self.start_unprojected(num_prefix_tokens)
        self.set_projections(key_projection, value_projection)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        layout: TokenLayout | None = None,
    ) -> Tensor:
        projections = self.projections()
        self._refuse_causal(is_causal)
        if projections is None:
            out = super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
            if self.local is None:
                return out
            patches = find_patches(x, self.local.grid_size, self.num_prefix_tokens, layout, attn_mask)
        else:
            x = cast_once(x)
            patches = read_patches(x, *projections, self.num_prefix_tokens, layout, attn_mask)
            out = self._attend(x, *projections, patches)
        return out if self.local is None else self._add_to_patches(out, self.local(x, patches))

    def _attend(self, x: Tensor, key_proj: Projection, value_proj: Projection, patches: Patches) -> Tensor:
        order = self._choose_order(key_proj, value_proj, x)
        if order == "per_head":
            queries, keys, values = self._per_head(x, key_proj, value_proj, patches)
            keys = self.k_norm(keys)  # (B, H, K, d)
            bias = self._key_bias(x, key_proj.lengths, patches)
            return self.proj_drop(self._output(self._softmax_attention(self.q_norm(queries), keys, values, bias)))
        attend = self._prepare(x, key_proj, value_proj, patches, order)
        # Given the keys and values, tokens do not depend on each other.
        if runs_in_chunks(x):
            out = apply_in_chunks(attend, x, CHUNK_ELEMENTS // self.attn_dim)
        else:
            out = attend(x, slice(None))
        return self.proj_drop(out)

    def outputs_of(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The outputs (B, t, D) of the tokens with the indices `tokens` (t), given all tokens x (B, T, D).

        The layer must have projections. Output dropout is not applied. Raises ValueError if `qkv` is not a plain linear
        layer.
        """
        projections = self.projections()
        assert projections is not None
        if not is_plain_linear(self.qkv):
            raise ValueError("outputs_of reads the weight of qkv: remove adapters, hooks and quantised weights from it")
        patches = read_patches(x, *projections, self.num_prefix_tokens, layout=None, mask=None)
        out = self._prepare(x, *projections, patches, "associative")(x[:, tokens], slice(None))
        return self._with_local(out, x, patches, tokens)

    def _prepare(
        self, x: Tensor, key_proj: Projection, value_proj: Projection, patches: Patches, order: Order
    ) -> Attend:
        weights = self._weights(x.dtype)
        keys, values = self._associative(x, key_proj, value_proj, patches, weights)
        keys = self.k_norm(keys)  # (B, H, K, d)
        bias = self._key_bias(x, key_proj.lengths, patches)
        fold = self._folded if order == "folded" else self._unfolded
        return fold(keys, values, bias, weights)

    def _choose_order(self, key_proj: Projection, value_proj: Projection, x: Tensor) -> Order:
        is_matrix = isinstance(key_proj, MatrixProjection)
        # Only the per-head order calls `qkv`; the others read its weight, which must not bypass an adapter or a hook.
        readable = is_plain_linear(self.qkv)
        if not is_matrix and (self.order == "per_head" or not readable):
            raise self._no_per_head_order(key_proj, readable)
        if not readable:
            return "per_head"
        foldable = self.foldable and is_plain_linear(self.proj)
        if self.order == "folded" and not foldable:
            return "associative"
        return self.order or choose_order(
            dim=self.attn_dim,
            num_heads=self.num_heads,
            num_keys=self.num_prefix_tokens + key_proj.k,
            num_patches=key_proj.grid_size[0] * key_proj.grid_size[1],
            k=key_proj.k,
            num_maps=max(key_proj.num_maps, value_proj.num_maps),
            foldable=foldable and not keeps_scores_on_chip(x),
            is_matrix=is_matrix,
        )

    def _per_head(
        self, x: Tensor, key_proj: Projection, value_proj: Projection, patches: Patches
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, d), projected keys and values (B, H, K, d), projecting after Wk and Wv."""
        q, *kv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        projections = (key_proj, patches.key_share), (value_proj, patches.value_share)
        keys, values = (
            self._join(prefix, patches.project(proj, patches.place(tokens), share))
            for (prefix, tokens), (proj, share) in zip((self._split_prefix(y) for y in kv), projections)
        )
        return q, keys, values

    def _associative(
        self, x: Tensor, key_proj: Projection, value_proj: Projection, patches: Patches, weights: "_Weights"
    ) -> tuple[Tensor, Tensor]:
        """Projected keys and values (B, H, K, d), projecting before Wk and Wv: (EX)Wk + (E1)bᵀ."""
        prefix, tokens = self._split_prefix(x[:, None])
        is_matrix = isinstance(key_proj, MatrixProjection)
        on_grid = patches.place(tokens) if is_matrix else patches.fill(tokens, key_proj.absent)

        has_bias = weights.kv_bias is not None
        rows = self._rows(prefix, on_grid, key_proj, patches.key_share, patches, has_bias=has_bias)
        if value_proj is key_proj:
            keys, values = self._map_rows(*rows, weights.kv, weights.kv_bias, parts=2)
            return keys, values
        value_rows = self._rows(prefix, on_grid, value_proj, patches.value_share, patches, has_bias=has_bias)
        biases = (None, None) if weights.kv_bias is None else weights.kv_bias.chunk(2)
        (keys,), (values,) = (
            self._map_rows(*part, weight, bias)
            for part, weight, bias in zip((rows, value_rows), weights.kv.chunk(2), biases)
        )
        return keys, values

    def _unfolded(self, keys: Tensor, values: Tensor, bias: Tensor | None, weights: "_Weights") -> Attend:
        """softmax(X Wq K̄ᵀ/√d) V̄, then the output layer."""

        def attend(x: Tensor, images: slice) -> Tensor:
            queries = self.q_norm(self._split_heads(F.linear(x, weights.q, weights.q_bias)))
            own_bias = bias if bias is None or bias.shape[0] == 1 else _select(bias, images)
            own_keys, own_values = _select(keys, images), _select(values, images)
            return self._output(self._softmax_attention(queries, own_keys, own_values, own_bias))

        return attend

    def _folded(self, keys: Tensor, values: Tensor, bias: Tensor | None, weights: "_Weights") -> Attend:
        """softmax(X (Wq K̄ᵀ/√d)) (V̄ Wo), with the softmax within each head's keys."""
        keys = keys * self.scale
        offset = keys.new_zeros(1, 1, 1, keys.shape[2]) if bias is None else bias
        if weights.q_bias is not None:
            offset = offset + (keys @ weights.q_bias.unflatten(0, (self.num_heads, -1, 1))).mT  # (B, H, 1, K)
        offset = offset.expand(keys.shape[0], self.num_heads, 1, -1).flatten(1)[:, None]  # (B, 1, H·K)
        score_weight = (keys @ weights.q.unflatten(0, (self.num_heads, -1))).flatten(1, 2)  # (B, H·K, D)
        out_weight = self.proj.weight.unflatten(1, (self.num_heads, -1)).permute(1, 2, 0)  # (H, d, D)
        value_weight = (values @ out_weight).flatten(1, 2)  # (B, H·K, D)
        offset = offset.to(score_weight.dtype)
        out_bias = self.proj.bias

        def attend(x: Tensor, images: slice) -> Tensor:
            scores = torch.baddbmm(_select(offset, images), x, _select(score_weight, images).mT)
            attn = self.attn_drop(scores.unflatten(2, (self.num_heads, -1)).softmax(dim=-1)).flatten(2)
            own_weight = _select(value_weight, images)
            return attn @ own_weight if out_bias is None else torch.baddbmm(out_bias, attn, own_weight)

        return attend

    def _output(self, heads: Tensor) -> Tensor:
        out: Tensor = self.proj(self.norm(heads.transpose(1, 2).flatten(2)))
        return out

    def _weights(self, dtype: torch.dtype) -> "_Weights":
        weight, bias = self.qkv.weight, self.qkv.bias
        if weight.dtype != dtype and autocast_dtype(weight) == dtype:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        # The gradient of one split is one copy; that of three slices would be three matrices of zeros.
        sizes = [self.attn_dim, 2 * self.attn_dim]
        q, kv = weight.split(sizes)
        q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
        return _Weights(q, kv, q_bias, kv_bias)

    def _split_heads(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptableAttention(self)


def _select(y: Tensor, images: slice) -> Tensor:
    """y[images], but y itself for all images: the gradient of a slice is a copy."""
    return y if images == slice(None) else y[images]


class _Weights(NamedTuple):
    """The weights of the `qkv` layer for queries (D, D) and for keys and values (2 D, D), and their biases."""

    q: Tensor
    kv: Tensor
    q_bias: Tensor | None
    kv_bias: Tensor | None
