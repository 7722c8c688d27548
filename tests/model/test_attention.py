"""LinformerAttention against the reference, in float64, forward and every gradient."""

import pytest
import torch
from kinds import GRIDS, KIND_SHARES, KINDS, REDUCING, orders_of, reductions
from timm.layers import Attention
from torch import nn

from linvit import reference
from linvit.model.attention import LinformerAttention, choose_order
from linvit.model.projections import build_projection
from linvit.model.tokens import TokenLayout

HEADS = 3
PREFIXES = {"class token": 1, "no prefix": 0, "class and 4 registers": 5}
ORDERS = ["per_head", "associative", "folded"]
# Where F comes from, and how many maps E and F have.
OWNERS = {"none": ("own", HEADS), "headwise": ("own", 1), "kv": ("same", 1), "layerwise": ("same", 1)}


def make(kind, share, grid, prefix, k=None, **kwargs):
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


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("kind", "share", "order"), [(k, s, order) for k, s in KIND_SHARES for order in orders_of(k)])
def test_equals_reference(kind, share, grid, prefix, order):
    attention, E, F = make(kind, share, grid, prefix)
    attention.order = order
    x = tokens(grid, prefix)
    assert_same_with_gradients(attention(x), expected(attention, E, F, x), [x, *parameters_of(attention, E, F)])


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("kind", "order"), [(k, order) for k in KINDS if k != "identity" for order in orders_of(k)])
def test_one_length_per_head(kind, grid, prefix, order):
    attention, E, F = make(kind, "none", grid, prefix, k=[6, 4, 9])
    attention.order = order
    x = tokens(grid, prefix)
    assert_same_with_gradients(attention(x), expected(attention, E, F, x), [x, *parameters_of(attention, E, F)])


# Every kind with one sharing it takes, and one kind with all.
MASKED = [("linear", share) for share in OWNERS if share != "kv"]
MASKED += [(kind, "kv") for kind in KINDS if kind != "identity"]
MASKED = [(kind, share, order) for kind, share in [*MASKED, ("conv", "none")] for order in orders_of(kind)]


PER_HEAD = [(kind, "none", order, [6, 4, 9]) for kind in KINDS if kind != "identity" for order in orders_of(kind)]


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize(("kind", "share", "order", "k"), [*((*case, None) for case in MASKED), *PER_HEAD], ids=str)
def test_key_padding_mask_is_applied_before_projecting(kind, share, prefix, order, k):
    attention, E, F = make(kind, share, (7, 5), prefix, k=k)
    attention.order = order
    x = tokens((7, 5), prefix)
    keep = torch.rand(2, x.shape[1]) > 0.4
    if prefix:
        keep[0, 0], keep[1, prefix - 1] = True, False
    # The first cell of pools and convolutions is without any patch.
    keep[0, prefix : prefix + 2] = keep[0, prefix + 5 : prefix + 7] = False
    fast = attention(x, attn_mask=keep[:, None, None])
    slow = expected(
        attention,
        E,
        F,
        x,
        present=keep[:, prefix:],
        prefix_mask=keep[:, :prefix] if prefix else None,
    )
    assert_same_with_gradients(fast, slow, [x, *parameters_of(attention, E, F)])


@pytest.mark.parametrize(("kind", "share", "order"), [(k, s, o) for k, s, o in MASKED if k not in REDUCING])
def test_dropped_patches_select_columns_and_rescale(kind, share, order):
    attention, E, F = make(kind, share, (7, 5), 1)
    attention.order = order
    whole = tokens((7, 5), 1)
    kept = torch.stack([torch.randperm(35)[:20] for _ in range(2)])
    x = torch.cat([whole[:, :1], whole[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, 12))], dim=1)
    fast = attention(x, layout=TokenLayout((7, 5), kept))
    columns = [[matrix[:, index] * 35 / 20 for matrix in reductions(p, HEADS)] for p in (E, F) for index in kept]
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


def kept_patches():
    """20 of 35 patches of two images, the tokens of the kept ones, and True on the whole grid where they lie."""
    kept = torch.stack([torch.randperm(35)[:20] for _ in range(2)])
    return kept, torch.zeros(2, 35, dtype=torch.bool).scatter(1, kept, True)


@pytest.mark.parametrize(("kind", "share", "order"), [(k, s, o) for k, s, o in MASKED if k in REDUCING])
def test_dropped_patches_are_left_out_of_reductions(kind, share, order):
    """The layer on a few tokens is the layer on all of them with the others left out, but for log(n/k)."""
    attention, E, F = make(kind, share, (7, 5), 0)
    attention.order = order
    whole = tokens((7, 5), 0)
    kept, there = kept_patches()
    index = kept[:, :, None].expand(-1, -1, 12)
    fast = attention(whole.gather(1, index), layout=TokenLayout((7, 5), kept))
    slow = expected(attention, E, F, whole, left_out=~there).gather(1, index)
    assert_same_with_gradients(fast, slow, [whole, *parameters_of(attention, E, F)])


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("kind", "share", "order"), MASKED)
def test_with_a_mask_dropped_patches_are_masked_ones(kind, share, order, prefix):
    attention, E, F = make(kind, share, (7, 5), prefix)
    attention.order = order
    whole = tokens((7, 5), prefix)
    kept, there = kept_patches()
    present = there & (torch.rand(2, 35) > 0.3)
    index = torch.cat([torch.arange(prefix).expand(2, -1), prefix + kept], dim=1)
    mask = torch.nn.functional.pad(present, (prefix, 0), value=True).gather(1, index)[:, None, None]
    index = index[:, :, None].expand(-1, -1, 12)
    fast = attention(whole.gather(1, index), attn_mask=mask, layout=TokenLayout((7, 5), kept))
    slow = expected(attention, E, F, whole, present=present).gather(1, index)
    assert_same_with_gradients(fast, slow, [whole, *parameters_of(attention, E, F)])


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(
    ("kind", "order"), [(kind, o) for kind in KINDS if kind != "identity" for o in orders_of(kind)]
)
def test_other_grid_equals_the_remapped_layer(kind, order, prefix):
    attention, E, F = make(kind, "headwise", (7, 5), prefix, k=6)
    attention.order = order
    x = tokens((4, 9), prefix)
    fast = attention(x, layout=TokenLayout((4, 9)))
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


@pytest.mark.parametrize("kind", REDUCING)
def test_kinds_that_reduce_tokens_have_no_per_head_order(kind):
    attention, _, _ = make(kind, "kv", (7, 5), 1)
    attention.order = "per_head"
    with pytest.raises(ValueError, match=f"projection '{kind}' reduces tokens before Wk and Wv"):
        attention(tokens((7, 5), 1))
    rule = dict(dim=384, num_heads=6, k=256, num_patches=4096, num_maps=6, is_matrix=False)
    assert choose_order(**rule, num_keys=257, foldable=True) == "associative"


def test_cost_rule():
    small = dict(dim=384, num_heads=6, num_patches=4096, foldable=True)
    assert choose_order(num_keys=33, k=32, num_maps=1, **small) == "folded"
    # K·H and the folding itself are 402 against D + K = 449, and 464 against 459.
    assert choose_order(num_keys=65, k=64, num_maps=1, **small) == "folded"
    assert choose_order(num_keys=75, k=74, num_maps=1, **small) == "associative"
    assert choose_order(num_keys=257, k=256, num_maps=1, **small) == "associative"
    # Few patches do not pay for folding: 300 + 195 against 434.
    assert choose_order(num_keys=50, k=49, num_maps=1, **{**small, "num_patches": 196}) == "associative"
    assert choose_order(num_keys=257, k=256, num_maps=6, **small) == "per_head"
    assert choose_order(num_keys=101, k=100, num_maps=3, **small) == "associative"
    assert choose_order(num_keys=33, k=32, num_maps=1, **{**small, "foldable": False}) == "associative"


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_inference_in_runs_is_the_same(order, batch, masked, prefix, monkeypatch):
    attention, _, _ = make("separable", "kv", (7, 5), prefix)
    attention.order = order
    x = tokens((7, 5), prefix)[:1].repeat(batch, 1, 1) + torch.arange(batch)[:, None, None]
    mask = torch.rand(batch, 1, 1, x.shape[1]) > 0.3 if masked else None
    with_gradient = attention(x, attn_mask=mask)
    for run in (5, 40, 1000):
        monkeypatch.setattr("linvit.model.attention.RUN_ELEMENTS", run * 12)
        with torch.inference_mode():
            torch.testing.assert_close(attention(x, attn_mask=mask), with_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ["per_head", "associative"])
@pytest.mark.parametrize("share", OWNERS)
def test_queries_in_chunks_equal_the_reference(share, order):
    attention, E, F = make("linear", share, (7, 5), 1)
    attention.order, attention.query_chunks = order, 5
    x = tokens((7, 5), 1)
    assert_same_with_gradients(attention(x), expected(attention, E, F, x), [x, *parameters_of(attention, E, F)])


class Adapted(nn.Linear):
    """A linear layer whose output is not that of its weight alone."""

    def forward(self, x):
        return super().forward(x) * 1.5


@pytest.mark.parametrize("layer", ["qkv", "proj"])
@pytest.mark.parametrize("order", ORDERS)
def test_adapters_are_not_passed_by(order, layer):
    attention, E, F = make("separable", "kv", (7, 5), 1)
    x = tokens((7, 5), 1)
    plain = getattr(attention, layer)
    adapted = Adapted(plain.in_features, plain.out_features, dtype=torch.float64)
    adapted.load_state_dict(plain.state_dict())
    setattr(attention, layer, adapted)
    attention.order = order
    out = attention(x)
    for parameter in (plain.weight, plain.bias):
        parameter.data *= 1.5
    setattr(attention, layer, plain)
    torch.testing.assert_close(out, expected(attention, E, F, x), rtol=0, atol=1e-10)


def test_kinds_that_reduce_tokens_refuse_an_adapted_qkv():
    attention, _, _ = make("conv", "kv", (7, 5), 1)
    attention.qkv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="take adapters and hooks off qkv"):
        attention(tokens((7, 5), 1))


@pytest.mark.parametrize(
    ("mask", "causal", "message"),
    [
        (None, True, "cannot be causal"),
        (torch.ones(36, 36, dtype=torch.bool), False, "key-padding mask of shape"),
        (torch.ones(2, 1, 36, 36, dtype=torch.bool), False, "key-padding mask of shape"),
        (torch.zeros(2, 1, 1, 36), False, "torch.float32"),
    ],
)
def test_refusals(mask, causal, message):
    attention, _, _ = make("linear", "kv", (7, 5), 1)
    with pytest.raises(ValueError, match=message):
        attention(tokens((7, 5), 1), attn_mask=mask, is_causal=causal)


def test_a_grid_that_is_too_small_is_refused():
    attention, _, _ = make("linear", "kv", (7, 5), 1)
    with pytest.raises(ValueError, match="k=11 does not shorten a sequence of 9 patches"):
        attention(tokens((3, 3), 1), layout=TokenLayout((3, 3)))


def test_wrong_number_of_patches_is_refused():
    attention, _, _ = make("linear", "kv", (7, 5), 1)
    with pytest.raises(ValueError, match="34 patch tokens do not fill the 7×5 grid"):
        attention(torch.randn(1, 35, 12, dtype=torch.float64))


def test_under_autocast_tokens_are_cast_once_and_the_result_is_that_of_half_precision():
    attention, *_ = make("separable", "kv", GRIDS[0], 1)
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
def test_on_a_gpu_it_is_the_reference(kind, share):
    attention, E, F = make(kind, share, GRIDS[0], 1)
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
