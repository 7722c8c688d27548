"""Attention layers and MLPs small enough to compare in every way, with their references."""

import torch
from kinds import KINDS, reductions
from timm.layers import Mlp
from torch import nn

from linvit import reference
from linvit.model.attention import LinformerAttention
from linvit.model.mlp import LeanMlp
from linvit.model.projections import build_projection

HEADS = 3
ORDERS = ["per_head", "associative", "folded"]
PREFIXES = {"class token": 1, "no prefix": 0, "class and 4 registers": 5}
# Where F comes from, and how many maps E and F have.
OWNERS = {"none": ("own", HEADS), "headwise": ("own", 1), "kv": ("same", 1), "layerwise": ("same", 1)}
RECOMPUTE = ["activation", "hidden"]
EXACT = dict(rtol=0, atol=1e-12)


def make_attention(kind, share, grid, prefix, k=None, **kwargs):
    owner, maps = OWNERS[share]
    k = KINDS[kind][grid] if k is None else k
    E, F = (build_projection(kind, k=k, grid_size=grid, num_maps=maps, dim=12, dtype=torch.float64) for _ in range(2))
    for parameter in [*E.parameters(), *F.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    attention = LinformerAttention(12, HEADS, qkv_bias=True, num_prefix_tokens=prefix, dtype=torch.float64, **kwargs)
    nn.init.normal_(attention.qkv.bias)
    attention.set_projections(E, F if owner == "own" else None)
    return attention, E, F if owner == "own" else E


def expected(attention, E, F, x, present=None, left_out=None, **kwargs):
    """The reference; `present` (B, N) for a mask, `left_out` for patches that reductions alone leave out."""
    reduced = present if left_out is None else ~left_out
    return reference.linformer_attention(
        x,
        qkv_weight=attention.qkv.weight,
        qkv_bias=attention.qkv.bias,
        out_weight=attention.proj.weight,
        out_bias=attention.proj.bias,
        E=reductions(E, HEADS, reduced),
        F=reductions(F, HEADS, reduced),
        num_prefix_tokens=attention.num_prefix_tokens,
        present=present,
        **kwargs,
    )


def assert_same_with_gradients(fast, slow, inputs):
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    cotangent = torch.randn_like(slow)
    grads = (torch.autograd.grad(y, inputs, cotangent, retain_graph=True) for y in (fast, slow))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def tokens(grid, prefix):
    return torch.randn(2, prefix + grid[0] * grid[1], 12, dtype=torch.float64, requires_grad=True)


def parameters_of(*modules):
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def mlp_pair(recompute="activation", dtype=torch.float64, **kwargs):
    """LeanMlp and timm's Mlp with the same weights."""
    ours, theirs = LeanMlp(12, 48, dtype=dtype, **kwargs), Mlp(12, 48, dtype=dtype, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    ours.recompute = recompute
    return ours, theirs
