"""LinformerAttention equals the reference in float64, forward and every gradient."""

import pytest
import torch
from kinds import GRIDS, KIND_SHARES, KINDS, orders_of
from small_layers import (
    HEADS,
    ORDERS,
    OWNERS,
    PREFIXES,
    assert_same_with_gradients,
    expected,
    make_attention,
    parameters_of,
    tokens,
)
from timm.layers import Attention
from torch import nn

from linvit.model.kernels import choose_order


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("kind", "share", "order"), [(k, s, order) for k, s in KIND_SHARES for order in orders_of(k)])
def test_equals_reference(kind, share, grid, prefix, order):
    attention, E, F = make_attention(kind, share, grid, prefix)
    attention.order = order
    x = tokens(grid, prefix)
    assert_same_with_gradients(attention(x), expected(attention, E, F, x), [x, *parameters_of(attention, E, F)])


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("kind", "order"), [(k, order) for k in KINDS if k != "identity" for order in orders_of(k)])
def test_one_length_per_head(kind, grid, prefix, order):
    attention, E, F = make_attention(kind, "none", grid, prefix, k=[6, 4, 9])
    attention.order = order
    x = tokens(grid, prefix)
    assert_same_with_gradients(attention(x), expected(attention, E, F, x), [x, *parameters_of(attention, E, F)])


@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True, "norm_layer": nn.LayerNorm}, {"attn_drop": 0.3}])
def test_identity_is_timms_attention(kwargs):
    attention, _, _ = make_attention("identity", "kv", (7, 5), 1, **kwargs)
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
    attention, E, F = make_attention("linear", share, (7, 5), 0, k=34)
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
    attention, E, _ = make_attention("linear", "kv", (7, 5), 1)
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
    attention, _, _ = make_attention(
        "linear", "headwise", (7, 5), 1, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm
    )
    for norm in (attention.q_norm, attention.k_norm, attention.norm):
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias)
    x = tokens((7, 5), 1)
    assert (
        choose_order(dim=12, num_heads=1, num_keys=2, num_patches=35, k=1, num_maps=1, foldable=attention.foldable)
        != "folded"
    )
    attention.order = "per_head"
    first = attention(x)
    attention.order = order
    torch.testing.assert_close(attention(x), first, rtol=0, atol=1e-10)
    attention.fused_attn = False
    torch.testing.assert_close(attention(x), first, rtol=0, atol=1e-10)


@pytest.mark.parametrize("share", OWNERS)
def test_no_biases(share):
    attention, E, F = make_attention("separable", share, (7, 5), 1, proj_bias=False)
    attention.qkv.bias = None
    x = tokens((7, 5), 1)
    for order in ORDERS:
        attention.order = order
        torch.testing.assert_close(attention(x), expected(attention, E, F, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_dropout_acts_in_training_only(order):
    attention, E, F = make_attention("linear", "kv", (7, 5), 1, attn_drop=0.5)
    attention.order = order
    x = tokens((7, 5), 1)
    assert not torch.equal(attention(x), attention(x))
    # Each image of a batch has its own dropout.
    mean = attention(x.repeat(2000, 1, 1)).unflatten(0, (2000, -1)).mean(0)
    attention.eval()
    torch.testing.assert_close(attention(x), expected(attention, E, F, x), rtol=0, atol=1e-10)
    torch.testing.assert_close(mean, attention(x), rtol=0, atol=0.12)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_inference_in_chunks_is_the_same(order, batch, masked, prefix, monkeypatch):
    attention, _, _ = make_attention("separable", "kv", (7, 5), prefix)
    attention.order = order
    x = tokens((7, 5), prefix)[:1].repeat(batch, 1, 1) + torch.arange(batch)[:, None, None]
    mask = torch.rand(batch, 1, 1, x.shape[1]) > 0.3 if masked else None
    with_gradient = attention(x, attn_mask=mask)
    for chunk in (5, 40, 1000):
        monkeypatch.setattr("linvit.model.attention.CHUNK_ELEMENTS", chunk * 12)
        with torch.inference_mode():
            torch.testing.assert_close(attention(x, attn_mask=mask), with_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ["per_head", "associative"])
@pytest.mark.parametrize("share", OWNERS)
def test_queries_in_chunks_equal_the_reference(share, order):
    attention, E, F = make_attention("linear", share, (7, 5), 1)
    attention.order, attention.query_chunks = order, 5
    x = tokens((7, 5), 1)
    assert_same_with_gradients(attention(x), expected(attention, E, F, x), [x, *parameters_of(attention, E, F)])


def test_attending_to_tokens_does_not_bypass_an_adapter():
    attention, _, _ = make_attention("separable", "kv", GRIDS[0], 1)
    x = tokens(GRIDS[0], 1)
    torch.testing.assert_close(attention.outputs_of(x, torch.arange(2, 5)), attention(x)[:, 2:5])
    attention.qkv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="remove adapters, hooks and quantised weights"):
        attention.outputs_of(x, torch.arange(2))


def test_autocast_casts_tokens_once():
    attention, *_ = make_attention("separable", "kv", GRIDS[0], 1)
    attention, x = attention.float(), tokens(GRIDS[0], 1).detach().float()
    exact = attention(x)
    casts = []
    for layer in (attention.key_projection, attention.proj):
        layer.register_forward_pre_hook(lambda _, args: casts.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x)
    assert casts == [torch.bfloat16, torch.bfloat16]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=2e-2 * exact.abs().max().item())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "share"), KIND_SHARES)
def test_equals_reference_on_a_gpu(kind, share):
    attention, E, F = make_attention(kind, share, GRIDS[0], 1)
    x = tokens(GRIDS[0], 1)
    parameters = parameters_of(attention, E, F)
    slow = expected(attention, E, F, x)
    cotangent = torch.randn_like(slow)
    wanted = torch.autograd.grad(slow, [x, *parameters], cotangent)
    attention.cuda()
    x_gpu = x.detach().cuda().requires_grad_()
    for order in orders_of(kind):
        attention.order = order
        fast = attention(x_gpu)
        torch.testing.assert_close(fast.cpu(), slow, rtol=0, atol=1e-10)
        found = torch.autograd.grad(fast, [x_gpu, *parameters], cotangent.cuda())
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-10)
    attention.order = None
    attention.float()
    with torch.autocast("cuda", torch.bfloat16):
        half = attention(x_gpu.float())
    torch.testing.assert_close(half.double().cpu(), slow, rtol=0, atol=3e-2 * slow.abs().max().item())
