"""The order of multiplication: the cost rule, and what forces or excludes an order."""

import pytest
import torch
from kinds import REDUCING
from small_layers import ORDERS, expected, make_attention, tokens
from torch import nn

from linvit.model.order import choose_order


def test_cost_rule():
    small = dict(dim=384, num_heads=6, num_patches=4096, foldable=True)
    assert choose_order(num_keys=33, k=32, num_maps=1, **small) == "folded"
    # K·H and the folding itself cost 402 against D + K = 449, then 464 against 459.
    assert choose_order(num_keys=65, k=64, num_maps=1, **small) == "folded"
    assert choose_order(num_keys=75, k=74, num_maps=1, **small) == "associative"
    assert choose_order(num_keys=257, k=256, num_maps=1, **small) == "associative"
    # With few patches folding does not pay: 300 + 195 against 434.
    assert choose_order(num_keys=50, k=49, num_maps=1, **{**small, "num_patches": 196}) == "associative"
    assert choose_order(num_keys=257, k=256, num_maps=6, **small) == "per_head"
    assert choose_order(num_keys=101, k=100, num_maps=3, **small) == "associative"
    assert choose_order(num_keys=33, k=32, num_maps=1, **{**small, "foldable": False}) == "associative"


@pytest.mark.parametrize("kind", REDUCING)
def test_kinds_that_reduce_tokens_have_no_per_head_order(kind):
    attention, _, _ = make_attention(kind, "kv", (7, 5), 1)
    attention.order = "per_head"
    with pytest.raises(ValueError, match=f"projection '{kind}' reduces tokens before Wk and Wv"):
        attention(tokens((7, 5), 1))
    rule = dict(dim=384, num_heads=6, k=256, num_patches=4096, num_maps=6, is_matrix=False)
    assert choose_order(**rule, num_keys=257, foldable=True) == "associative"


class Adapted(nn.Linear):
    """A linear layer whose output does not follow from its weight alone."""

    def forward(self, x):
        return super().forward(x) * 1.5


@pytest.mark.parametrize("layer", ["qkv", "proj"])
@pytest.mark.parametrize("order", ORDERS)
def test_adapters_are_called(order, layer):
    attention, E, F = make_attention("separable", "kv", (7, 5), 1)
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
    attention, _, _ = make_attention("conv", "kv", (7, 5), 1)
    attention.qkv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="remove adapters, hooks and quantised weights from qkv"):
        attention(tokens((7, 5), 1))
