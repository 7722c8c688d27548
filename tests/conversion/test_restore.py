"""Giving layers their ordinary attention back after a fit."""

import pytest
import torch
from test_fit import CLOSED_FORM, difference
from vits import make_activations, make_rotary, make_vit

from linvit.conversion.blocks import block_arguments
from linvit.conversion.convert import convert_vit, projected_lengths
from linvit.conversion.fit import fit_layers
from linvit.conversion.restore import layer_to_restore, with_ordinary_layers


@pytest.mark.parametrize("make", [make_vit, make_rotary])
def test_the_layer_that_helps_most_is_restored(make):
    model = make()
    converted = convert_vit(model, k=9)
    fit_layers(model, converted, make_activations(model), CLOSED_FORM)
    chosen = layer_to_restore(model, converted, make_activations(model))
    # Swap blocks one at a time; the held-out images are the last eight.
    images = make_activations(model)
    errors = []
    for layer in range(3):
        swapped = convert_vit(model, k=9)
        swapped.load_state_dict(converted.state_dict())
        swapped.blocks[layer] = model.blocks[layer]
        errors.append(difference_on(model, swapped, images))
    assert chosen == min(range(3), key=lambda layer: errors[layer])


def difference_on(model, other, activations):
    tokens, arguments = activations.held_out(activations.original), block_arguments(model)
    ends = []
    with torch.no_grad():
        for each in (model, other):
            x = tokens
            for block, where in zip(each.blocks, arguments):
                x = block(x, **where)
            ends.append(each.norm(x))
    relative = (ends[1] - ends[0]).square().sum(-1) / ends[0].square().sum(-1)
    prefix = model.num_prefix_tokens
    return float(relative[:, :prefix].mean() + relative[:, prefix:].mean())


@torch.no_grad()
def test_restored_layers_have_the_originals_attention():
    model = make_vit()
    converted = convert_vit(model, k=9, local=3)
    torch.nn.init.normal_(converted.blocks[1].attn.proj.weight)
    torch.nn.init.normal_(converted.blocks[1].attn.local.weight)
    restored = with_ordinary_layers(model, converted, [1])
    assert projected_lengths(restored) == [9, None, 9]
    assert not restored.blocks[1].attn.local.weight.any()
    assert torch.equal(restored.blocks[1].attn.proj.weight, model.blocks[1].attn.proj.weight)
    assert projected_lengths(converted) == [9, 9, 9]
    everywhere = with_ordinary_layers(model, converted, [0, 1, 2])
    assert difference(model, everywhere) == pytest.approx(0, abs=1e-3)
    assert layer_to_restore(model, everywhere, make_activations(model)) is None
