"""The TorchScript versions of Linformer attention: the per-head order with E and F as constant dense matrices."""

import math
from typing import Any, Optional

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.model.projections import MatrixProjection, Projection
from linvit.model.tokens import TokenLayout


class _Scriptable(nn.Module):
    """Inference-only copy of an attention layer, for its own grid and without masks.

    `torch.jit.script(model)` uses it automatically and does not change `model`. Raises ValueError for projections that
    are not matrices.
    """

    key_matrix: Optional[Tensor]  # noqa: UP045
    value_matrix: Optional[Tensor]  # noqa: UP045
    bias: Optional[Tensor]  # noqa: UP045
    local_kernel: Optional[Tensor]  # noqa: UP045

    def __init__(self, attention: Any) -> None:
        super().__init__()
        projections, local = attention.projections(), attention.local
        # torch.jit identifies modules by id while it scripts, so no module that it has seen may be freed.
        self._replaced = [attention]
        self.num_heads = attention.num_heads
        self.head_dim = attention.head_dim
        self.num_prefix_tokens = attention.num_prefix_tokens
        self.proj = attention.proj
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        matrices: list[Tensor | None] = [None, None]
        bias = None
        if projections is not None:
            weight = attention.proj.weight
            matrices = [_matrix(each).detach().to(weight) for each in projections]
            bias = self._dense_bias(projections[0].lengths, matrices[0])
        self.register_buffer("key_matrix", matrices[0])
        self.register_buffer("value_matrix", matrices[1])
        self.register_buffer("bias", bias)
        self.register_buffer("local_kernel", None if local is None else local.weight.detach())
        self.local_grid = (0, 0) if local is None else local.grid_size

    def _dense_bias(self, lengths: list[int], matrix: Tensor | None) -> Tensor:
        assert matrix is not None
        num_patches, longest = matrix.shape[2], matrix.shape[1]
        bias = matrix.new_zeros(1, len(lengths), 1, self.num_prefix_tokens + longest)
        for head, k in enumerate(lengths):
            own = bias[0, head, 0, self.num_prefix_tokens :]
            own[:k] = math.log(num_patches / k) if self.num_prefix_tokens else 0.0
            own[k:] = -math.inf
        return bias

    def project(self, y: Tensor, matrix: Optional[Tensor]) -> Tensor:  # noqa: UP045
        if matrix is None:
            return y
        P = self.num_prefix_tokens
        return torch.cat([y[:, :, :P], matrix @ y[:, :, P:]], dim=2)

    def add_local(self, out: Tensor, x: Tensor) -> Tensor:
        kernel = self.local_kernel
        if kernel is None:
            return out
        P, D = self.num_prefix_tokens, x.shape[2]
        image = x[:, P:].transpose(1, 2).reshape(x.shape[0], D, self.local_grid[0], self.local_grid[1])
        added = F.conv2d(image, kernel, padding=kernel.shape[3] // 2, groups=D).flatten(2).transpose(1, 2)
        return torch.cat([out[:, :P], out[:, P:] + added], dim=1)


class ScriptableAttention(_Scriptable):
    """The copy of a `LinformerAttention`."""

    def __init__(self, attention: Any) -> None:
        super().__init__(attention)
        self.qkv = attention.qkv

    def forward(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor] = None,  # noqa: UP045
        is_causal: bool = False,
        layout: Optional[TokenLayout] = None,  # noqa: UP045
    ) -> Tensor:
        assert attn_mask is None, "a scripted Linformer attention layer takes no mask"
        assert layout is None, "a scripted Linformer attention layer works on one grid"
        assert not is_causal, "Linformer attention cannot be causal"
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = self.project(qkv[1], self.key_matrix), self.project(qkv[2], self.value_matrix)
        attended = F.scaled_dot_product_attention(self.q_norm(qkv[0]), self.k_norm(k), v, attn_mask=self.bias)
        return self.add_local(self.proj(self.norm(attended.transpose(1, 2).reshape(B, T, D))), x)


class ScriptableRotaryAttention(_Scriptable):
    """The copy of a `RotaryAttention`."""

    weight: Tensor
    qkv_bias: Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__(attention)
        self.gate = attention.gate
        self.rotate_half = bool(attention.rotate_half)
        layers = [layer for part in "qkv" for layer in attention.head_layers(part)]
        self.register_buffer("weight", torch.cat([weight for weight, _ in layers]).detach())
        full = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in layers]
        self.register_buffer("qkv_bias", torch.cat(full).detach())

    def rotate(self, y: Tensor, rope: Optional[Tensor]) -> Tensor:  # noqa: UP045
        if rope is None:
            return y
        P = self.num_prefix_tokens
        return torch.cat([y[:, :, :P], apply_rot_embed_cat(y[:, :, P:], rope, half=self.rotate_half)], dim=2)

    def forward(
        self,
        x: Tensor,
        rope: Optional[Tensor] = None,  # noqa: UP045
        attn_mask: Optional[Tensor] = None,  # noqa: UP045
        is_causal: bool = False,
    ) -> Tensor:
        assert attn_mask is None, "a scripted Linformer attention layer takes no mask"
        assert not is_causal, "Linformer attention cannot be causal"
        B, T, _ = x.shape
        qkv = F.linear(x, self.weight, self.qkv_bias)
        qkv = qkv.reshape(B, T, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = self.rotate(self.q_norm(qkv[0]), rope), self.rotate(self.k_norm(qkv[1]), rope)
        k, v = self.project(k, self.key_matrix), self.project(qkv[2], self.value_matrix)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        out = self.norm(attended.transpose(1, 2).reshape(B, T, -1))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.add_local(self.proj(out), x)


def _matrix(projection: Projection) -> Tensor:
    if not isinstance(projection, MatrixProjection):
        raise ValueError(
            f"TorchScript needs projections that are matrices, and projection {projection.kind!r} is not one: "
            f"use torch.compile or torch.export"
        )
    return projection.matrix()
