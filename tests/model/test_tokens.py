"""Masked and dropped patches, and other grids, in one attention layer."""

import pytest
import torch
from kinds import KINDS, REDUCING, orders_of, reductions
from small_layers import (
    HEADS,
    OWNERS,
    PREFIXES,
    assert_same_with_gradients,
    expected,
    make_attention,
    parameters_of,
    tokens,
)

from linvit import reference
from linvit.model.tokens import TokenLayout

# Every kind with one sharing, and one kind with all of them.
MASKED = [("linear", share) for share in OWNERS if share != "kv"]
MASKED += [(kind, "kv") for kind in KINDS if kind != "identity"]
MASKED = [(kind, share, order) for kind, share in [*MASKED, ("conv", "none")] for order in orders_of(kind)]
PER_HEAD = [(kind, "none", order, [6, 4, 9]) for kind in KINDS if kind != "identity" for order in orders_of(kind)]


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize(("kind", "share", "order", "k"), [*((*case, None) for case in MASKED), *PER_HEAD], ids=str)
def test_key_padding_mask_is_applied_before_projecting(kind, share, prefix, order, k):
    attention, E, F = make_attention(kind, share, (7, 5), prefix, k=k)
    attention.order = order
    x = tokens((7, 5), prefix)
    keep = torch.rand(2, x.shape[1]) > 0.4
    if prefix:
        keep[0, 0], keep[1, prefix - 1] = True, False
    # The first cell of pools and convolutions has no patch.
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
    attention, E, F = make_attention(kind, share, (7, 5), 1)
    attention.order = order
    full = tokens((7, 5), 1)
    kept = torch.stack([torch.randperm(35)[:20] for _ in range(2)])
    x = torch.cat([full[:, :1], full[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, 12))], dim=1)
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
    assert_same_with_gradients(fast, slow, [full, *parameters_of(attention, E, F)])


def kept_patches():
    """The indices of 20 of 35 patches for two images, and a mask (2, 35) of them."""
    kept = torch.stack([torch.randperm(35)[:20] for _ in range(2)])
    return kept, torch.zeros(2, 35, dtype=torch.bool).scatter(1, kept, True)


@pytest.mark.parametrize(("kind", "share", "order"), [(k, s, o) for k, s, o in MASKED if k in REDUCING])
def test_dropped_patches_are_left_out_of_reductions(kind, share, order):
    """Without prefix tokens, the layer on the kept tokens equals the layer on all, with the others left out."""
    attention, E, F = make_attention(kind, share, (7, 5), 0)
    attention.order = order
    full = tokens((7, 5), 0)
    kept, is_kept = kept_patches()
    index = kept[:, :, None].expand(-1, -1, 12)
    fast = attention(full.gather(1, index), layout=TokenLayout((7, 5), kept))
    slow = expected(attention, E, F, full, left_out=~is_kept).gather(1, index)
    assert_same_with_gradients(fast, slow, [full, *parameters_of(attention, E, F)])


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("kind", "share", "order"), MASKED)
def test_with_a_mask_dropped_patches_count_as_masked(kind, share, order, prefix):
    attention, E, F = make_attention(kind, share, (7, 5), prefix)
    attention.order = order
    full = tokens((7, 5), prefix)
    kept, is_kept = kept_patches()
    present = is_kept & (torch.rand(2, 35) > 0.3)
    index = torch.cat([torch.arange(prefix).expand(2, -1), prefix + kept], dim=1)
    mask = torch.nn.functional.pad(present, (prefix, 0), value=True).gather(1, index)[:, None, None]
    index = index[:, :, None].expand(-1, -1, 12)
    fast = attention(full.gather(1, index), attn_mask=mask, layout=TokenLayout((7, 5), kept))
    slow = expected(attention, E, F, full, present=present).gather(1, index)
    assert_same_with_gradients(fast, slow, [full, *parameters_of(attention, E, F)])


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(
    ("kind", "order"), [(kind, o) for kind in KINDS if kind != "identity" for o in orders_of(kind)]
)
def test_other_grid_equals_the_remapped_layer(kind, order, prefix):
    attention, E, F = make_attention(kind, "headwise", (7, 5), prefix, k=6)
    attention.order = order
    x = tokens((4, 9), prefix)
    fast = attention(x, layout=TokenLayout((4, 9)))
    for projection in (E, F):
        projection.set_grid_size((4, 9))
    torch.testing.assert_close(fast, expected(attention, E, F, x), rtol=0, atol=1e-10)


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
    attention, _, _ = make_attention("linear", "kv", (7, 5), 1)
    with pytest.raises(ValueError, match=message):
        attention(tokens((7, 5), 1), attn_mask=mask, is_causal=causal)


def test_a_grid_that_is_too_small_is_refused():
    attention, _, _ = make_attention("linear", "kv", (7, 5), 1)
    with pytest.raises(ValueError, match="k=11 does not shorten a sequence of 9 patches"):
        attention(tokens((3, 3), 1), layout=TokenLayout((3, 3)))


def test_wrong_number_of_patches_is_refused():
    attention, _, _ = make_attention("linear", "kv", (7, 5), 1)
    with pytest.raises(ValueError, match="34 patch tokens do not fill the 7×5 grid"):
        attention(torch.randn(1, 35, 12, dtype=torch.float64))
