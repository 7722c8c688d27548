"""Linformer attention of timm's rotary layers, against the reference in float64, forward and every gradient."""

from functools import partial

import pytest
import torch
from kinds import KIND_SHARES, KINDS, REDUCING, reductions
from small_layers import OWNERS, assert_same_with_gradients, parameters_of
from timm.layers import AttentionRope, RmsNorm, apply_rot_embed_cat, create_rope_embed
from timm.models.eva import EvaAttention
from torch import nn

from linvit import reference
from linvit.model.projections import build_projection
from linvit.model.rotary import Rotary, make_projectable
from linvit.model.tokens import TokenLayout

GRID = (6, 5)
N = GRID[0] * GRID[1]
DIM, HEADS, HEAD_DIM = 24, 3, 8
FLOAT64 = dict(dtype=torch.float64)
LAYERS = {
    "EVA-02, fused": lambda: EvaAttention(DIM, HEADS, scale_norm=False),
    "DINOv3, no bias": lambda: EvaAttention(DIM, HEADS, qkv_bias=False, scale_norm=False, rotate_half=True),
    "EVA-02, split": lambda: EvaAttention(DIM, HEADS, qkv_fused=False, scale_norm=False),
    "bias apart": lambda: EvaAttention(DIM, HEADS, qkv_bias_separate=True, scale_norm=False),
    "PE, fused": lambda: AttentionRope(DIM, HEADS),
    "gated": lambda: AttentionRope(DIM, HEADS, gated=True),
    "normalised": lambda: EvaAttention(DIM, HEADS, qk_norm=True, scale_norm=False, norm_layer=RmsNorm),
    "Sapiens2, one head of keys": lambda: AttentionRope(
        DIM, HEADS, qkv_fused=False, num_kv_heads=1, qk_norm=True, norm_layer=RmsNorm, rotate_half=True
    ),
}
EMBEDDINGS = {
    "cat": partial(create_rope_embed, rope_type="cat", in_pixels=False),
    "dinov3": partial(create_rope_embed, rope_type="dinov3", rotate_half=True),
    "mixed": partial(create_rope_embed, rope_type="mixed", depth=2),
}


def make(layer="PE, fused", kind="separable", share="kv", prefix=1, k=None):
    torch.manual_seed(0)
    attention = LAYERS[layer]().double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.shape == (HEAD_DIM,) else 0.0, std=0.3)
    attention.num_prefix_tokens = prefix
    make_projectable(attention)
    owner, maps = OWNERS[share]
    k = k or (6 if kind in ("separable", "conv", "avgpool", "maxpool") else 7)
    E, F = (build_projection(kind, k=k, grid_size=GRID, num_maps=maps, dim=DIM, **FLOAT64) for _ in range(2))
    for parameter in [*E.parameters(), *F.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    attention.set_projections(E, F if owner == "own" else None)
    return attention, E, F if owner == "own" else E


def embed(kind="cat"):
    """Sines and cosines of the grid's patches: (N, 2d), or (H, N, 2d) if they are learned."""
    torch.manual_seed(1)
    table = EMBEDDINGS[kind](dim=DIM, num_heads=HEADS, feat_shape=GRID).get_embed().detach().double()
    return table[1] if kind == "mixed" else table


def rotations(table, half):
    """The rotations as matrices (H, N, d, d)."""
    columns = apply_rot_embed_cat(torch.eye(HEAD_DIM, **FLOAT64)[:, None, None], table, half=half)  # (d, 1 or H, N, d)
    return columns.permute(1, 2, 3, 0).expand(HEADS, -1, -1, -1)


def expected(attention, E, F, x, table, present=None):
    half = attention.rotate_half
    if attention.qkv is None:
        layers = attention.q_proj, attention.k_proj, attention.v_proj
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    else:
        weights, biases = attention.qkv.weight.chunk(3), [None] * 3
        if getattr(attention, "q_bias", None) is not None:
            biases = [attention.q_bias, None, attention.v_bias]
        elif attention.qkv.bias is not None:
            biases = attention.qkv.bias.chunk(3)
    by_head = []
    for weight, bias in zip(weights, biases):
        own = list(zip(weight.split(HEAD_DIM), [None] * HEADS if bias is None else bias.split(HEAD_DIM)))
        by_head.append([each for each in own for _ in range(HEADS // len(own))])
    q, k, v = by_head
    return reference.rotary_linformer_attention(
        x,
        q=q,
        k=k,
        v=v,
        out_weight=attention.proj.weight,
        out_bias=attention.proj.bias,
        E=reductions(E, HEADS, present),
        F=reductions(F, HEADS, present),
        R=rotations(table, half),
        rotate=attention.rotate or ("rows" if E.kind in REDUCING else "keys"),
        normalise=(attention.q_norm, attention.k_norm),
        gate=None if attention.gate is None else attention.gate(x).sigmoid(),
        num_prefix_tokens=attention.num_prefix_tokens,
        present=present,
    )


def tokens(prefix=1):
    torch.manual_seed(2)
    return torch.randn(2, prefix + N, DIM, requires_grad=True, **FLOAT64)


def inputs_of(x, attention, E, F):
    return [x, *(p for p in parameters_of(attention, E, F) if p.requires_grad)]


def assert_equals_reference(attention, E, F, table, prefix=1):
    x = tokens(prefix)
    found = attention(x, rope=table)
    assert_same_with_gradients(found, expected(attention, E, F, x, table), inputs_of(x, attention, E, F))


@pytest.mark.parametrize("order", [None, "per_head"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layout_of_timm(layer, order):
    attention, E, F = make(layer)
    attention.order = order
    assert_equals_reference(attention, E, F, embed())


@pytest.mark.parametrize(("kind", "share"), [each for each in KIND_SHARES if each[0] != "identity"])
def test_every_kind_and_sharing(kind, share):
    attention, E, F = make("normalised", kind, share)
    assert_equals_reference(attention, E, F, embed())


@pytest.mark.parametrize("share", OWNERS)
def test_few_heads_of_keys_with_every_sharing(share):
    attention, E, F = make("Sapiens2, one head of keys", "linear", share)
    for attention.order in ("associative", "per_head"):
        assert_equals_reference(attention, E, F, embed())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_rotating_rows(kind):
    attention, E, F = make("normalised", kind)
    attention.rotate = "rows"
    assert_equals_reference(attention, E, F, embed())


@pytest.mark.parametrize("rotate", ["keys", "rows"])
@pytest.mark.parametrize("kind", EMBEDDINGS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_every_embedding_and_prefix(kind, prefix, rotate):
    attention, E, F = make("PE, fused", prefix=prefix)
    attention.rotate, attention.rotate_half = rotate, kind == "dinov3"
    assert_equals_reference(attention, E, F, embed(kind), prefix)


@pytest.mark.parametrize("kind", ["separable", "dct", "maxpool"])
def test_masked_patches(kind):
    attention, E, F = make("normalised", kind)
    present = torch.ones(2, N, dtype=torch.bool)
    present[0, 20:] = False
    mask = torch.cat([torch.ones(2, 1, dtype=torch.bool), present], dim=1)[:, None, None]
    x, table = tokens(), embed()
    with torch.no_grad():
        found = attention(x, rope=table, attn_mask=mask)
        torch.testing.assert_close(found, expected(attention, E, F, x, table, present), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rotate", ["keys", "rows"])
def test_dropped_patches_with_a_mask_are_masked_patches(rotate):
    attention, E, F = make("Sapiens2, one head of keys")
    attention.rotate = rotate
    x, table = tokens(), embed("dinov3")
    kept = torch.stack([torch.arange(0, 20), torch.arange(10, 30)])
    index = torch.cat([torch.zeros(2, 1, dtype=torch.long), kept + 1], dim=1)
    own = table[None].expand(2, -1, -1).gather(1, kept[:, :, None].expand(-1, -1, table.shape[1]))[:, None]
    some = x.gather(1, index[:, :, None].expand(-1, -1, DIM))
    layout = TokenLayout(GRID, kept)
    found = attention(some, rope=Rotary(own, layout), attn_mask=torch.ones(2, 1, 1, 21, dtype=torch.bool))
    present = torch.zeros(2, N, dtype=torch.bool).scatter(1, kept, True)
    whole = expected(attention, E, F, x, table, present)
    torch.testing.assert_close(found, whole.gather(1, index[:, :, None].expand(-1, -1, DIM)), rtol=0, atol=1e-10)


def test_identity_matrix_gives_timms_attention():
    attention, _, _ = make("normalised", "linear", k=N - 1)
    attention.key_projection.weight = nn.Parameter(torch.eye(N, **FLOAT64).view(1, N, *GRID))
    attention.key_projection.k = N
    x, table = tokens(), embed()
    found = attention(x, rope=table)
    attention.set_projections(None)
    torch.testing.assert_close(found, attention(x, rope=table), rtol=0, atol=1e-12)


def test_without_rotary_embedding_positions_do_not_matter():
    attention, E, F = make("DINOv3, no bias")
    unrotated = torch.cat([torch.zeros(N, HEAD_DIM), torch.ones(N, HEAD_DIM)], dim=-1).double()
    x = tokens()
    torch.testing.assert_close(attention(x), attention(x, rope=unrotated), rtol=0, atol=1e-12)
    torch.testing.assert_close(attention(x), expected(attention, E, F, x, unrotated), rtol=0, atol=1e-10)


@pytest.mark.parametrize("layer", ["PE, fused", "EVA-02, split"])
def test_adapters_are_not_bypassed(layer):
    attention, _, _ = make(layer, "linear")
    x, table = tokens(), embed()
    before = attention(x, rope=table)
    hooked = attention.v_proj if attention.qkv is None else attention.qkv
    hooked.register_forward_hook(lambda module, args, y: 2 * y)
    assert (attention(x, rope=table) - before).abs().max() > 1e-3
    attention, _, _ = make(layer, "maxpool")
    (attention.v_proj if attention.qkv is None else attention.qkv).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="remove adapters, hooks and quantised weights"):
        attention(x, rope=table)


def test_outputs_of_some_tokens():
    attention, _, _ = make("gated")
    x, table = tokens(), embed()
    found = attention.outputs_of(x, torch.arange(3, 7), table)
    torch.testing.assert_close(found, attention(x, rope=table)[:, 3:7], rtol=0, atol=1e-12)


def test_a_layer_is_exported_for_any_batch():
    attention, _, _ = make("normalised", "maxpool")
    x, table = tokens().detach(), embed()
    exported = torch.export.export(attention, (x, table), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    x = torch.cat([x, x, x])
    torch.testing.assert_close(exported.module()(x, table), attention(x, table), rtol=0, atol=1e-10)


def test_refusals():
    attention, _, _ = make("PE, fused", "maxpool")
    attention.rotate = "keys"
    with pytest.raises(ValueError, match="projection 'maxpool' reduces tokens before Wk, so it can rotate rows only"):
        attention(tokens(), rope=embed())
    with pytest.raises(ValueError, match="cannot be causal"):
        attention(tokens(), rope=embed(), is_causal=True)
    with pytest.raises(ValueError, match="patch tokens do not fill the 6×5 grid"):
        attention(tokens()[:, :-1], rope=embed())
