"""Linformer attention for timm's rotary layers, `EvaAttention` and `AttentionRope` (DINOv3, EVA-02, PE, Sapiens2).

Rotary embedding (Su et al. 2021, arXiv 2104.09864; in two dimensions Heo et al. 2024, arXiv 2403.13298) multiplies
query and key of each patch j by a rotation R_j that depends on its position in the grid. Projected keys are rotated in
one of two ways:

    rotated keys   K̄_i = Σ_j E_ij R_j N(x_j Wk)             rotate, then project: what E does to the keys of attention
    rotated rows   K̄_i = R̄_i N(Σ_j E_ij x_j Wk)             project, then rotate by the mean rotation of the row

    R̄_i = Σ_j |E_ij| R_j / Σ_j |E_ij|

N is the query and key normalisation, if any. The first needs Wk on all N patches. Values are not rotated, so they are
projected before Wv where that is cheaper. Kinds that reduce tokens have no E for keys, and rotate rows.

The layers keep timm's parameters and names, and all features of timm's classes: separate biases, normalised or gated
outputs, fewer heads for keys and values. Without projections they are timm's own.

B batch, P prefix tokens, N patches of the grid, n patches present, T = P + n tokens, D width, H heads, G heads of keys
and values, d head width, M maps of a projection (1 or H), k projected length, K = P + k keys.
"""

from typing import Literal, NamedTuple

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models import register_notrace_module
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.model.kernels import autocast_dtype, cast_once, is_plain_linear
from linvit.model.projected import ProjectedAttention
from linvit.model.projections import MatrixProjection, Projection
from linvit.model.scripted import ScriptableRotaryAttention
from linvit.model.tokens import Patches, TokenLayout, find_patches, read_patches

RotaryOrder = Literal["keys", "rows"]


class Rotary(NamedTuple):
    """Rotary embedding and layout of a layer's tokens, passed in place of timm's tensor `rope`.

    Attributes:
        embed: sines, then cosines, of the patches that are present: (n, 2d), (H, n, 2d), or (B, 1 or H, n, 2d); None
            without rotary embedding.
        layout: where the tokens lie if they do not fill the projections' own grid.
    """

    embed: Tensor | None
    layout: TokenLayout | None = None


class RotaryAttention(ProjectedAttention):
    """Rotary self-attention whose keys and values are projected from N patches to k.

    `forward` takes tokens (B, T, D), and as `rope` timm's tensor or a `Rotary`. `attn_mask` and the errors are those of
    `LinformerAttention`.

    Attributes:
        rotate: "keys" or "rows", see above; None lets the kind of E decide. Tests and benchmarks set it.
    """

    rotate: RotaryOrder | None

    def forward(
        self,
        x: Tensor,
        rope: Tensor | Rotary | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        embed, layout = rope if isinstance(rope, Rotary) else (rope, None)
        projections = self.projections()
        self._refuse_causal(is_causal)
        if projections is None:
            out: Tensor = super().forward(x, rope=embed, attn_mask=attn_mask, is_causal=is_causal)
            if self.local is None:
                return out
            patches = find_patches(x, self.local.grid_size, self.num_prefix_tokens, layout, attn_mask)
        else:
            x = cast_once(x)
            patches = read_patches(x, *projections, self.num_prefix_tokens, layout, attn_mask)
            out = self._attend(x, *projections, patches, embed)
        return out if self.local is None else self._add_to_patches(out, self.local(x, patches))

    def _attend(
        self,
        x: Tensor,
        key_proj: Projection,
        value_proj: Projection,
        patches: Patches,
        embed: Tensor | None,
        tokens: Tensor | slice = slice(None),
    ) -> Tensor:
        """The outputs of all tokens, or of those with the indices `tokens`."""
        gate = None if self.gate is None else self.gate(x[:, tokens]).sigmoid()
        queries, keys, values = self._queries_keys_values(x, key_proj, value_proj, patches, embed)
        queries = queries[:, :, tokens]
        bias = self._key_bias(x, key_proj.lengths, patches)
        out = self.norm(self._softmax_attention(queries, keys, values, bias).transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(out if gate is None else out * gate))

    def outputs_of(self, x: Tensor, tokens: Tensor, rope: Tensor | Rotary | None = None) -> Tensor:
        """The outputs (B, t, D) of the tokens with the indices `tokens` (t), given all tokens x (B, T, D).

        The layer must have projections. Output dropout is not applied.
        """
        embed, layout = rope if isinstance(rope, Rotary) else (rope, None)
        projections = self.projections()
        assert projections is not None
        patches = read_patches(x, *projections, self.num_prefix_tokens, layout, mask=None)
        return self._with_local(self._attend(x, *projections, patches, embed, tokens), x, patches, tokens)

    def _queries_keys_values(
        self, x: Tensor, key_proj: Projection, value_proj: Projection, patches: Patches, embed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, d), and projected keys and values (B, H, K, d)."""
        table = None if embed is None else _by_token(embed)  # (B or 1, n, 1 or H, 2d)
        rotate = None if table is None else self._rotary_order(key_proj)
        per_head = self._order(key_proj, value_proj) == "per_head"
        parts = "qkv" if per_head else "qk" if rotate == "keys" else "q"
        q, *kv = self._of_all_tokens(x, parts)  # (B, T, H or G, d)
        q = self.q_norm(q)
        if table is not None:
            q = self._rotate(q, _for_prefix_too(table, self.num_prefix_tokens, dim=1))
        if rotate == "keys":
            prefix, own = self._split_tokens(self.k_norm(kv[0]))
            kv[0] = torch.cat([prefix, self._rotate(own, table)], dim=1)
        keys, values = self._projected(x, kv, key_proj, value_proj, patches)
        if rotate != "keys":
            keys = self.k_norm(keys)
        if rotate == "rows" and table is not None:
            keys = self._rotate(keys, self._row_table(table, key_proj, patches, x.shape[0]))
        return q.transpose(1, 2), self._for_all_heads(keys), self._for_all_heads(values)

    def _projected(
        self, x: Tensor, kv: list[Tensor], key_proj: Projection, value_proj: Projection, patches: Patches
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H or G, K, d), from those of all tokens in `kv` where it has them, else from x."""
        pairs = (key_proj, patches.key_share), (value_proj, patches.value_share)
        found = [self._project_heads(y, *pair, patches) for y, pair in zip(kv, pairs)]
        if len(found) < 2:
            prefix, tokens = self._split_prefix(x[:, None])
            is_matrix = isinstance(key_proj, MatrixProjection)
            on_grid = patches.place(tokens) if is_matrix else patches.fill(tokens, key_proj.absent)
            layers = [self._weight(part, x.dtype) for part in "kv"[len(found) :]]
            # In EVA-02 only values have a bias.
            has_bias = any(bias is not None for _, bias in layers)
            rows = None
            for (weight, bias), (projection, share) in zip(layers, pairs[len(found) :]):
                if rows is None or value_proj is not key_proj:
                    rows = self._rows(prefix, on_grid, projection, share, patches, has_bias=has_bias)
                if projection.num_maps > 1:
                    weight = self._for_all_heads_of(weight)
                    bias = None if bias is None else self._for_all_heads_of(bias)
                found += self._map_rows(*rows, weight, bias)
        return found[0], found[1]

    def _project_heads(self, y: Tensor, projection: Projection, share: Tensor | None, patches: Patches) -> Tensor:
        """Keys or values of all tokens (B, T, H or G, d), projected: (B, H or G, K, d)."""
        if projection.num_maps > 1:
            by_head = self._for_all_heads(y.transpose(1, 2))
            prefix, tokens = self._split_prefix(by_head)
            return self._join(prefix, patches.project(projection, patches.place(tokens), share))
        prefix, tokens = self._split_prefix(y.flatten(2)[:, None])  # one product for all heads
        rows = self._join(prefix, patches.project(projection, patches.place(tokens), share))
        return rows.squeeze(1).unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def _row_table(self, table: Tensor, projection: Projection, patches: Patches, batch: int) -> Tensor:
        """Sines and cosines of R̄, with prefix rows that do not rotate: (B or 1, M or H, K, 2d)."""
        by_head = table.transpose(1, 2)
        if patches.seen is not None or patches.kept is not None:
            by_head = by_head.expand(batch, -1, -1, -1)
        ones = by_head.new_ones(by_head.shape[0], 1, by_head.shape[2], 1)
        with torch.autocast(table.device.type, enabled=False):
            mean, mass = (projection.row_mass(patches.fill(y, 0.0), patches.grid_size) for y in (by_head, ones))
        return _for_prefix_too(mean / mass.masked_fill(mass == 0, 1.0), self.num_prefix_tokens, dim=2)

    def _rotary_order(self, key_proj: Projection) -> RotaryOrder:
        is_matrix = isinstance(key_proj, MatrixProjection)
        if self.rotate == "keys" and not is_matrix:
            raise ValueError(f"projection {key_proj.kind!r} reduces tokens before Wk, so it can rotate rows only")
        return self.rotate or ("keys" if is_matrix else "rows")

    def _order(self, key_proj: Projection, value_proj: Projection) -> Literal["per_head", "associative"]:
        """How values are projected (and keys, unless they are rotated first): after Wv or before."""
        is_matrix = isinstance(key_proj, MatrixProjection)
        # Weights that are read must not bypass an adapter or a hook.
        layers = (self.k_proj, self.v_proj) if self.qkv is None else (self.qkv,)
        readable = all(is_plain_linear(layer) for layer in layers)
        if not is_matrix and (not readable or self.order == "per_head"):
            raise self._no_per_head_order(key_proj, readable)
        if not readable or self.order == "per_head":
            return "per_head"
        # Multiply-adds per patch and channel, see `linvit.model.kernels.choose_order`.
        maps = max(key_proj.num_maps, value_proj.num_maps)
        is_cheaper = key_proj.k * maps <= self.num_heads * self.head_dim + key_proj.k
        return "associative" if self.order is not None or is_cheaper or not is_matrix else "per_head"

    def _of_all_tokens(self, x: Tensor, parts: str) -> list[Tensor]:
        """The first parts of queries, keys and values of all tokens, each (B, T, H or G, d)."""
        if self.qkv is None:
            layers = self.q_proj, self.k_proj, self.v_proj
            return [layer(x).unflatten(-1, (-1, self.head_dim)) for layer, _ in zip(layers, parts)]
        if is_plain_linear(self.qkv):
            weight, bias = self._fused(x.dtype)
            width = len(parts) * self.num_heads * self.head_dim
            y = F.linear(x, weight[:width], None if bias is None else bias[:width])
        else:
            y, bias = self.qkv(x), self._separate_bias()
            y = y if bias is None else y + bias
        return list(y.unflatten(-1, (-1, self.num_heads, self.head_dim)).unbind(-3))[: len(parts)]

    def _weight(self, part: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of queries, keys or values ("q", "k", "v")."""
        if self.qkv is None:
            layer = {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj}[part]
            return _cast(layer.weight, layer.bias, dtype)
        weight, bias = self._fused(dtype)
        index = "qkv".index(part)
        return weight.chunk(3)[index], None if bias is None else bias.chunk(3)[index]

    def _fused(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        bias = self._separate_bias()
        return _cast(self.qkv.weight, self.qkv.bias if bias is None else bias, dtype)

    def _separate_bias(self) -> Tensor | None:
        """The biases that `EvaAttention` keeps outside `qkv`."""
        if getattr(self, "q_bias", None) is None:
            return None
        return torch.cat((self.q_bias, self.k_bias, self.v_bias))

    def head_layers(self, part: Literal["q", "k", "v"]) -> list[tuple[Tensor, Tensor | None]]:
        """Weight (d, D) and bias (d) of queries, keys or values, for each head of the queries."""
        weight, bias = self._weight(part, self.proj.weight.dtype)
        weights = self._for_all_heads_of(weight).split(self.head_dim)
        biases = [None] * len(weights) if bias is None else self._for_all_heads_of(bias).split(self.head_dim)
        return list(zip(weights, biases))

    def rotations(self, rope: Tensor | None, *, num_patches: int) -> Tensor:
        """R of each head and patch as dense matrices (H, N, d, d), from timm's tensor `rope`; for tests."""
        eye = torch.eye(self.head_dim, device=self.proj.weight.device)
        if rope is None:
            return eye.expand(self.num_heads, num_patches, -1, -1)
        table = _by_token(rope)[0].transpose(0, 1)  # (1 or H, N, 2d)
        columns = self._rotate(eye[:, None, None].to(table), table)  # (d, 1 or H, N, d)
        return columns.permute(1, 2, 3, 0).expand(self.num_heads, -1, -1, -1)

    def _rotate(self, y: Tensor, table: Tensor | None) -> Tensor:
        assert table is not None
        rotated: Tensor = apply_rot_embed_cat(y, table, half=self.rotate_half)
        return rotated

    def _for_all_heads(self, y: Tensor) -> Tensor:
        """Keys or values (B, H or G, ·, d) for each head of the queries."""
        return y if y.shape[1] == self.num_heads else y.repeat_interleave(self.num_heads // y.shape[1], dim=1)

    def _for_all_heads_of(self, weight: Tensor) -> Tensor:
        """Rows of a weight or bias (G·d, …) for each head of the queries: (H·d, …)."""
        by_head = weight.unflatten(0, (-1, self.head_dim))
        return by_head.repeat_interleave(self.num_heads // by_head.shape[0], dim=0).flatten(0, 1)

    def _split_tokens(self, y: Tensor) -> list[Tensor]:
        return y.split([self.num_prefix_tokens, y.shape[1] - self.num_prefix_tokens], dim=1)

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptableRotaryAttention(self)


@register_notrace_module
class LinformerEvaAttention(RotaryAttention, EvaAttention):
    """timm's `EvaAttention` with projected keys and values: DINOv3, EVA-02."""


@register_notrace_module
class LinformerRopeAttention(RotaryAttention, AttentionRope):
    """timm's `AttentionRope` with projected keys and values: Perception Encoder, ROPE-ViT, Sapiens2."""


_LINFORMER: dict[type, type[RotaryAttention]] = {
    EvaAttention: LinformerEvaAttention,
    AttentionRope: LinformerRopeAttention,
}


def make_projectable(attention: nn.Module) -> None:
    """Turn one of timm's rotary layers into a `RotaryAttention` without projections; its weights do not change.

    timm's models build these layers themselves and have no argument for their class.
    """
    attention.__class__ = _LINFORMER[type(attention)]
    assert isinstance(attention, RotaryAttention)
    attention.rotate = None
    attention.start_unprojected(attention.num_prefix_tokens)


def _by_token(embed: Tensor) -> Tensor:
    """timm's sines and cosines (n, 2d), (H, n, 2d) or (B, 1 or H, n, 2d) as (B or 1, n, 1 or H, 2d)."""
    by_head = embed[(None,) * (4 - embed.ndim)]
    return by_head.transpose(1, 2)


def _for_prefix_too(table: Tensor, num_prefix_tokens: int, *, dim: int) -> Tensor:
    """Put the rotation by zero in front of sines and cosines, for prefix tokens along `dim`."""
    if num_prefix_tokens == 0:
        return table
    shape = list(table.shape)
    shape[dim], shape[-1] = num_prefix_tokens, shape[-1] // 2
    return torch.cat([torch.cat([table.new_zeros(shape), table.new_ones(shape)], dim=-1), table], dim=dim)


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if weight.dtype != dtype and autocast_dtype(weight) == dtype:
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    return weight, bias
