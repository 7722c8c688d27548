"""LinformerAttention against the reference, in float64, forward and every gradient."""

import itertools

import pytest
import torch
from kinds import GRIDS, KINDS
from timm.layers import Attention
from torch import nn

from linvit import reference
from linvit.attention import LinformerAttention, TokenLayout, choose_order
from linvit.projections import build_projection

HEADS = 3
PREFIXES = {"class token": 1, "no prefix": 0, "class and 4 registers": 5}
ORDERS = ["per_head", "associative", "folded"]
# Where F comes from, and how many maps E and F have.
OWNERS = {"none": ("own", HEADS), "headwise": ("own", 1), "kv": ("same", 1), "layerwise": ("same", 1)}


def make(kind, share, grid, prefix, k=None, **kwargs):
    owner, maps = OWNERS[share]
    k = KINDS[kind][grid] if k is None else k
    E, F = (build_projection(kind, k=k, grid_size=grid, num_maps=maps, dtype=torch.float64) for _ in range(2))
    attention = LinformerAttention(12, HEADS, qkv_bias=True, num_prefix_tokens=prefix, dtype=torch.float64, **kwargs)
    nn.init.normal_(attention.qkv.bias)
    attention.set_projections(E, F if owner == "own" else None)
    return attention, E, F if owner == "own" else E


def head_matrices(projection):
    matrices = projection.matrix().double()
    lengths = projection.lengths * (HEADS // len(projection.lengths))
    matrices = matrices.expand(HEADS, -1, -1)
    return [matrix[:length] for matrix, length in zip(matrices, lengths)]


def expected(attention, E, F, x, **kwargs):
    return reference.linformer_attention(
        x,
        qkv_weight=attention.qkv.weight,
        qkv_bias=attention.qkv.bias,
        out_weight=attention.proj.weight,
        out_bias=attention.proj.bias,
        E=head_matrices(E),
        F=head_matrices(F),
        num_prefix_tokens=attention.num_prefix_tokens,
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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("kind", "share"), list(itertools.product(KINDS, OWNERS)))
def test_equals_reference(kind, share, grid, prefix, order):
    attention, E, F = make(kind, share, grid, prefix)
    attention.order = order
    x = tokens(grid, prefix)
    assert_same_with_gradients(attention(x), expected(attention, E, F, x), [x, *parameters_of(attention, E, F)])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_one_length_per_head(kind, grid, prefix, order):
    attention, E, F = make(kind, "none", grid, prefix, k=[6, 4, 9])
    attention.order = order
    x = tokens(grid, prefix)
    assert_same_with_gradients(attention(x), expected(attention, E, F, x), [x, *parameters_of(attention, E, F)])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("share", OWNERS)
def test_key_padding_mask_is_applied_before_projecting(share, prefix, order):
    attention, E, F = make("linear", share, (7, 5), prefix)
    attention.order = order
    x = tokens((7, 5), prefix)
    keep = torch.rand(2, x.shape[1]) > 0.4
    if prefix:
        keep[0, 0], keep[1, prefix - 1] = True, False
    fast = attention(x, attn_mask=keep[:, None, None])
    slow = expected(
        attention, E, F, x, patch_weight=keep[:, prefix:].double(), prefix_mask=keep[:, :prefix] if prefix else None
    )
    assert_same_with_gradients(fast, slow, [x, *parameters_of(attention, E, F)])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("share", OWNERS)
def test_dropped_patches_select_columns_and_rescale(share, order):
    attention, E, F = make("separable", share, (7, 5), 1)
    attention.order = order
    whole = tokens((7, 5), 1)
    kept = torch.stack([torch.randperm(35)[:20] for _ in range(2)])
    x = torch.cat([whole[:, :1], whole[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, 12))], dim=1)
    fast = attention(x, attn_mask=TokenLayout((7, 5), kept))
    columns = [[matrix[:, index] * 35 / 20 for matrix in head_matrices(p)] for p in (E, F) for index in kept]
    slow = torch.cat(
        [
            reference.linformer_attention(
                x[i : i + 1],
                qkv_weight=attention.qkv.weight,
                qkv_bias=attention.qkv.bias,
                out_weight=attention.proj.weight,
                out_bias=attention.proj.bias,
                E=columns[i],
                F=columns[2 + i],
                num_prefix_tokens=1,
            )
            for i in range(2)
        ]
    )
    assert_same_with_gradients(fast, slow, [whole, *parameters_of(attention, E, F)])


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_other_grid_equals_the_remapped_layer(order, prefix):
    attention, E, F = make("linear", "headwise", (7, 5), prefix)
    attention.order = order
    x = tokens((4, 9), prefix)
    fast = attention(x, attn_mask=TokenLayout((4, 9)))
    for projection in (E, F):
        projection.set_grid_size((4, 9))
    torch.testing.assert_close(fast, expected(attention, E, F, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True, "norm_layer": nn.LayerNorm}, {"attn_drop": 0.3}])
def test_identity_is_timms_attention(kwargs):
    attention, _, _ = make("identity", "kv", (7, 5), 1, **kwargs)
    theirs = Attention(12, HEADS, qkv_bias=True, dtype=torch.float64, **kwargs)
    theirs.load_state_dict(attention.state_dict())
    x = tokens((7, 5), 1)
    torch.manual_seed(1)
    ours = attention(x, is_causal=not kwargs)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, theirs(x, is_causal=not kwargs), rtol=0, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("share", OWNERS)
def test_identity_matrix_gives_full_attention(share, order):
    """k = N is refused, so E is the identity on N - 1 patches and the last patch is masked in full attention."""
    attention, E, F = make("linear", share, (7, 5), 0, k=34)
    attention.order = order
    for projection in (E, F):
        projection.weight.data = (
            torch.eye(35, dtype=torch.float64)[:34].reshape(1, 34, 7, 5).expand_as(projection.weight)
        )
    theirs = Attention(12, HEADS, qkv_bias=True, dtype=torch.float64)
    theirs.load_state_dict(
        {key: value for key, value in attention.state_dict().items() if key.startswith(("qkv", "proj"))}
    )
    x = tokens((7, 5), 0)
    mask = torch.arange(35)[None, None, None] < 34
    torch.testing.assert_close(attention(x), theirs(x, attn_mask=mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_permuting_patches_with_the_columns_of_E_changes_nothing(order):
    attention, E, _ = make("linear", "kv", (7, 5), 1)
    attention.order = order
    x = tokens((7, 5), 1).detach()
    before = attention(x)
    shuffle = torch.randperm(35)
    E.weight.data = E.weight.data.flatten(2)[:, :, shuffle].unflatten(2, (7, 5))
    after = attention(torch.cat([x[:, :1], x[:, 1:][:, shuffle]], dim=1))
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[:, 1:], before[:, 1:][:, shuffle], rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ["per_head", "associative"])
def test_norms_act_on_projected_keys_in_every_order(order):
    attention, _, _ = make("linear", "headwise", (7, 5), 1, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm)
    for norm in (attention.q_norm, attention.k_norm, attention.norm):
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias)
    x = tokens((7, 5), 1)
    assert choose_order(dim=12, num_heads=1, num_keys=2, k=1, num_maps=1, foldable=attention.foldable) != "folded"
    attention.order = "per_head"
    first = attention(x)
    attention.order = order
    torch.testing.assert_close(attention(x), first, rtol=0, atol=1e-10)
    attention.fused_attn = False
    torch.testing.assert_close(attention(x), first, rtol=0, atol=1e-10)


@pytest.mark.parametrize("share", OWNERS)
def test_no_biases(share):
    attention, E, F = make("separable", share, (7, 5), 1, proj_bias=False)
    attention.qkv.bias = None
    x = tokens((7, 5), 1)
    for order in ORDERS:
        attention.order = order
        torch.testing.assert_close(attention(x), expected(attention, E, F, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_dropout_acts_in_training_only(order):
    attention, E, F = make("linear", "kv", (7, 5), 1, attn_drop=0.5)
    attention.order = order
    x = tokens((7, 5), 1)
    assert not torch.equal(attention(x), attention(x))
    mean = torch.stack([attention(x) for _ in range(2000)]).mean(0)
    attention.eval()
    torch.testing.assert_close(attention(x), expected(attention, E, F, x), rtol=0, atol=1e-10)
    torch.testing.assert_close(mean, attention(x), rtol=0, atol=0.12)


def test_cost_rule():
    small = dict(dim=384, num_heads=6, foldable=True)
    assert choose_order(num_keys=33, k=32, num_maps=1, **small) == "folded"
    assert choose_order(num_keys=65, k=64, num_maps=1, **small) == "associative"
    assert choose_order(num_keys=257, k=256, num_maps=6, **small) == "per_head"
    assert choose_order(num_keys=65, k=64, num_maps=6, **small) == "associative"
    assert choose_order(dim=384, num_heads=6, num_keys=33, k=32, num_maps=1, foldable=False) == "associative"


@pytest.mark.parametrize(
    ("mask", "causal", "message"),
    [
        (None, True, "cannot be causal"),
        (torch.ones(36, 36, dtype=torch.bool), False, "key-padding mask of shape"),
        (torch.ones(2, 1, 36, 36, dtype=torch.bool), False, "key-padding mask of shape"),
        (torch.zeros(2, 1, 1, 36), False, "torch.float32"),
        (TokenLayout((3, 3)), False, "k=11 does not shorten a sequence of 9 patches"),
    ],
)
def test_refusals(mask, causal, message):
    attention, _, _ = make("linear", "kv", (7, 5), 1)
    x = tokens((3, 3) if isinstance(mask, TokenLayout) else (7, 5), 1)
    with pytest.raises(ValueError, match=message):
        attention(x, attn_mask=mask, is_causal=causal)


def test_wrong_number_of_patches_is_refused():
    attention, _, _ = make("linear", "kv", (7, 5), 1)
    with pytest.raises(ValueError, match="34 patch tokens do not fill the 7×5 grid"):
        attention(torch.randn(1, 35, 12, dtype=torch.float64))
