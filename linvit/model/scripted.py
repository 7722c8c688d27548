"""The TorchScript version of `LinformerAttention`: the per-head order with E and F as constant dense matrices."""

import math
from typing import Optional

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.model.local import LocalConv
from linvit.model.projections import MatrixProjection, Projection
from linvit.model.tokens import TokenLayout


class ScriptableAttention(nn.Module):
    """Inference-only copy of an attention layer, for its own grid and without masks.

    `torch.jit.script(model)` uses it automatically and does not change `model`. Raises ValueError for projections that
    are not matrices.
    """

    key_matrix: Optional[Tensor]  # noqa: UP045
    value_matrix: Optional[Tensor]  # noqa: UP045
    bias: Optional[Tensor]  # noqa: UP045
    local_kernel: Optional[Tensor]  # noqa: UP045

    def __init__(
        self,
        attention: Attention,
        projections: tuple[Projection, Projection] | None,
        num_prefix_tokens: int,
        local: LocalConv | None,
    ) -> None:
        super().__init__()
        # torch.jit identifies modules by id while it scripts, so no module that it has seen may be freed.
        self._replaced = [attention]
        self.num_heads = attention.num_heads
        self.head_dim = attention.head_dim
        self.num_prefix_tokens = num_prefix_tokens
        self.qkv, self.proj = attention.qkv, attention.proj
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        matrices: list[Tensor | None] = [None, None]
        bias = None
        if projections is not None:
            weight = attention.qkv.weight
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
        q, k, v = qkv[0], qkv[1], qkv[2]
        key_matrix, value_matrix = self.key_matrix, self.value_matrix
        if key_matrix is not None and value_matrix is not None:
            P = self.num_prefix_tokens
            k = torch.cat([k[:, :, :P], key_matrix @ k[:, :, P:]], dim=2)
            v = torch.cat([v[:, :, :P], value_matrix @ v[:, :, P:]], dim=2)
        attended = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=self.bias)
        out = self.proj(self.norm(attended.transpose(1, 2).reshape(B, T, D)))
        kernel = self.local_kernel
        if kernel is not None:
            P = self.num_prefix_tokens
            image = x[:, P:].transpose(1, 2).reshape(B, D, self.local_grid[0], self.local_grid[1])
            added = F.conv2d(image, kernel, padding=kernel.shape[3] // 2, groups=D).flatten(2).transpose(1, 2)
            out = torch.cat([out[:, :P], out[:, P:] + added], dim=1)
        return out


def _matrix(projection: Projection) -> Tensor:
    if not isinstance(projection, MatrixProjection):
        raise ValueError(
            f"TorchScript needs projections that are matrices, and projection {projection.kind!r} is not one: "
            f"use torch.compile or torch.export"
        )
    return projection.matrix()
