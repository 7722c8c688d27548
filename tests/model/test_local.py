"""The convolution beside attention equals the reference in float64, on every grid and with patches left out."""

import pytest
import torch
from kinds import GRIDS, orders_of
from small_layers import HEADS, PREFIXES, assert_same_with_gradients, expected, make_attention, parameters_of, tokens
from small_vits import PREFIXES as VIT_PREFIXES
from small_vits import images, make
from timm.layers import Attention
from timm.models._manipulate import group_with_matcher
from torch import nn

from linvit import reference
from linvit.model.attention import LinformerAttention
from linvit.model.local import LocalConv
from linvit.model.tokens import TokenLayout
from linvit.model.vit import checkpoint_filter_fn


def with_conv(kind, grid, prefix, size=3):
    attention, E, F = make_attention(kind, "kv", grid, prefix)
    attention.local = LocalConv(12, size=size, grid_size=grid, dtype=torch.float64)
    nn.init.normal_(attention.local.weight)
    return attention, E, F


def added(attention, x, grid, present=None):
    """What the reference adds to the outputs of tokens x."""
    prefix = attention.num_prefix_tokens
    y = reference.local_branch(x[:, prefix:], grid, weight=attention.local.weight[:, 0], present=present)
    return nn.functional.pad(y, (0, 0, prefix, 0))


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("kind", "order"), [(kind, order) for kind in ("separable", "conv") for order in orders_of(kind)]
)
def test_equals_reference(kind, order, grid, prefix):
    attention, E, F = with_conv(kind, grid, prefix)
    attention.order = order
    x = tokens(grid, prefix)
    slow = expected(attention, E, F, x) + added(attention, x, grid)
    assert_same_with_gradients(attention(x), slow, [x, attention.local.weight, *parameters_of(attention, E, F)])


@pytest.mark.parametrize("size", [3, 5, 7])
def test_ordinary_attention_has_it_too(size):
    attention, _, _ = with_conv("identity", (7, 5), 1, size)
    theirs = Attention(12, HEADS, qkv_bias=True, dtype=torch.float64)
    theirs.load_state_dict({name: value for name, value in attention.state_dict().items() if "local" not in name})
    x = tokens((7, 5), 1)
    torch.testing.assert_close(attention(x), theirs(x) + added(attention, x, (7, 5)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["separable", "identity"])
def test_masked_patches_are_zeros(kind):
    attention, _, _ = with_conv(kind, (7, 5), 1)
    x = tokens((7, 5), 1)
    mask = torch.rand(2, 1, 1, 36) > 0.4
    conv, attention.local = attention.local, None
    plain = attention(x, attn_mask=mask)
    attention.local = conv
    slow = plain + added(attention, x, (7, 5), present=mask[:, 0, 0, 1:])
    assert_same_with_gradients(attention(x, attn_mask=mask), slow, [x, conv.weight])


@pytest.mark.parametrize("kind", ["separable", "identity"])
def test_dropped_patches_are_zeros(kind):
    attention, _, _ = with_conv(kind, (7, 5), 1)
    kept = torch.stack([torch.randperm(35)[:20] for _ in range(2)])
    full = tokens((7, 5), 1)
    x = torch.cat([full[:, :1], full[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, 12))], dim=1)
    layout = TokenLayout((7, 5), kept)
    conv, attention.local = attention.local, None
    plain = attention(x, layout=layout)
    attention.local = conv
    present = torch.zeros(2, 35, dtype=torch.bool).scatter(1, kept, True)
    y = added(attention, full, (7, 5), present)
    y = torch.cat([y[:, :1], y[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, 12))], dim=1)
    assert_same_with_gradients(attention(x, layout=layout), plain + y, [full, conv.weight])


def trained(**kwargs):
    """A model whose convolutions, which start at zero, are drawn."""
    model = make(local=3, **kwargs)
    for module in model.modules():
        if isinstance(module, LocalConv):
            nn.init.normal_(module.weight, std=0.3)
    return model


def test_a_checkpoint_without_it_gives_the_same_outputs(caplog):
    plain, model = make(), make(local=3)
    model.load_state_dict(checkpoint_filter_fn(plain.state_dict(), model))
    torch.testing.assert_close(model(images()), plain(images()), rtol=0, atol=0)
    assert "the checkpoint has no convolutions beside attention: 3 keep their initial zeros" in caplog.text


def test_new_parameters_are_exempt_from_decay_and_learn_at_the_heads_rate():
    model = make(local=3)
    names = {name for name, _ in model.named_parameters() if ".local." in name}
    assert len(names) == len(model.blocks)
    assert names <= model.no_weight_decay()
    *_, last = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=False).values()
    assert names <= set(last)


def test_a_dynamic_size_equals_set_input_size():
    dynamic, fixed = trained(dynamic_img_size=True), trained()
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size((16, 36))
    fixed.pos_embed = dynamic.pos_embed = None
    x = images((16, 36))
    torch.testing.assert_close(dynamic(x), fixed(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", VIT_PREFIXES.values(), ids=VIT_PREFIXES.keys())
def test_scripts_and_compiles(prefix):
    model = trained(k=[None, 6], depth=2, **prefix)
    x = images()
    y = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), y)
    torch.testing.assert_close(torch.jit.script(model)(x), y, rtol=0, atol=1e-5)


def test_patch_dropout_trains():
    # The class token does not see the last convolution.
    model = trained(patch_drop_rate=0.4, **VIT_PREFIXES["no prefix"]).train()
    model(images()).sum().backward()
    assert all(block.attn.local.weight.grad.abs().sum() > 0 for block in model.blocks)


@pytest.mark.parametrize("size", [0, 1, 2, 4, -3, 3.0, "3", True])
def test_other_kernel_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"local=.* is not a kernel size: give an odd number of patches, such as 3"):
        LocalConv(12, size=size, grid_size=(4, 4))


def test_it_is_not_causal():
    attention = LinformerAttention(12, HEADS)
    attention.local = LocalConv(12, size=3, grid_size=(7, 5))
    with pytest.raises(ValueError, match="sees later patches"):
        attention(torch.randn(1, 35, 12), is_causal=True)
