"""The output layer of attention and the convolution beside it, fitted together in closed form."""

import pytest
import torch
from test_fit import difference, fit
from torch import nn
from torch.nn import functional as F
from vits import make_activations, make_rotary, make_vit

from linvit.conversion.blocks import after_attention, block_arguments
from linvit.conversion.convert import convert_vit
from linvit.conversion.fit import FitOptions, _heads, _refit_with_local, fit_layers
from linvit.conversion.local import LocalMoments, _solution, best_changes, neighbourhoods
from linvit.conversion.solvers import DescentOptions
from linvit.model.local import LocalConv
from linvit.model.tokens import find_patches

GRID, WIDTH, PREFIX = (4, 3), 6, 2
FLOAT64 = dict(dtype=torch.float64)


def random_problem(tokens=400):
    torch.manual_seed(0)
    layer, local = nn.Linear(WIDTH, WIDTH).double(), LocalConv(WIDTH, size=3, grid_size=GRID, **FLOAT64)
    h, n = torch.randn(1, tokens, WIDTH, **FLOAT64), torch.randn(1, tokens, 9, WIDTH, **FLOAT64)
    residual, weights = torch.randn(1, tokens, WIDTH, **FLOAT64), torch.rand(1, tokens, **FLOAT64)
    moments = LocalMoments.of(layer, local)
    moments.add_local(h, n, residual, weights)
    return moments, h[0], n[0], residual[0], weights[0]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("penalty", [1e-2, 10.0])
def test_is_the_ridge_regression_of_each_channel(penalty, has_bias):
    moments, h, n, residual, weights = random_problem()
    change, kernel = _solution(moments, penalty, has_bias=has_bias)
    root = weights.sqrt()[:, None]
    own_scale = (n.square() * weights[:, None, None]).sum(0).mean()
    scale = (h.square() * weights[:, None]).sum(0).mean()
    for channel in range(WIDTH):
        inputs = torch.cat([h, n[:, :, channel], torch.ones(len(h), int(has_bias), **FLOAT64)], dim=1)
        penalties = torch.cat([scale.expand(WIDTH), own_scale.expand(9), torch.zeros(int(has_bias), **FLOAT64)])
        rows = torch.cat([root * inputs, torch.diag((penalty * penalties).sqrt())])
        target = torch.cat([root[:, 0] * residual[:, channel], torch.zeros(len(penalties), **FLOAT64)])
        expected = torch.linalg.lstsq(rows, target[:, None]).solution[:, 0]
        torch.testing.assert_close(change[:WIDTH, channel], expected[:WIDTH], rtol=0, atol=1e-10)
        torch.testing.assert_close(kernel[channel], expected[WIDTH : WIDTH + 9], rtol=0, atol=1e-10)
        torch.testing.assert_close(change[WIDTH, channel], expected[-1] if has_bias else torch.tensor(0.0).double())


def test_gain_is_the_decrease_of_the_squares():
    moments, h, n, residual, weights = random_problem()
    change, kernel = torch.randn(WIDTH + 1, WIDTH, **FLOAT64), torch.randn(WIDTH, 9, **FLOAT64)
    after = residual - h @ change[:WIDTH] - change[WIDTH] - torch.einsum("tsc,cs->tc", n, kernel)
    expected = ((residual.square() - after.square()).sum(1) * weights).sum()
    assert moments.gain_of(change, kernel) == pytest.approx(float(expected))


def test_held_out_images_reject_a_fit_to_noise():
    fitted, *_ = random_problem(tokens=12)
    torch.manual_seed(1)
    held_out = LocalMoments.of(nn.Linear(WIDTH, WIDTH).double(), LocalConv(WIDTH, size=3, grid_size=GRID, **FLOAT64))
    held_out.add_local(
        *(torch.randn(1, 50, *shape, **FLOAT64) for shape in ((WIDTH,), (9, WIDTH), (WIDTH,))), torch.ones(1, 50)
    )
    change, kernel = best_changes(fitted, held_out, has_bias=True)
    assert held_out.gain_of(change, kernel) >= 0


def test_neighbourhoods_are_those_of_the_convolution():
    torch.manual_seed(0)
    local = LocalConv(WIDTH, size=3, grid_size=GRID, **FLOAT64)
    nn.init.normal_(local.weight)
    normed = torch.randn(2, PREFIX + 12, WIDTH, **FLOAT64)
    tokens = torch.tensor([0, 1, 2, 7, 13, 5])
    n = neighbourhoods(normed, local, tokens, PREFIX)
    found = torch.einsum("ntsc,cs->ntc", n, local.weight.flatten(1))
    patches = find_patches(normed, GRID, PREFIX, layout=None, mask=None)
    expected = F.pad(local(normed, patches), (0, 0, PREFIX, 0))[:, tokens]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [make_vit, make_rotary])
def test_a_convolution_of_the_original_is_found_again(make):
    model = make(depth=1)
    target = convert_vit(model, projection="identity", local=3).eval()
    torch.manual_seed(3)
    nn.init.normal_(target.blocks[0].attn.local.weight, std=0.1)
    target.blocks[0].attn.proj.weight.data.mul_(1.2)
    converted = convert_vit(model, projection="identity", local=3)
    # With averages over cells, the layer counts as changed; attention of all patches then leaves only Wo and local.
    activations = make_activations(model, fitted=48)
    block = converted.blocks[0]
    where = block_arguments(model)[0]
    with torch.no_grad():
        wanted = after_attention(target.blocks[0], where, activations.original)
        heads = _heads(block, where, activations)
        _refit_with_local(block, activations, (heads, activations.original, wanted), torch.Generator().manual_seed(0))
        found = after_attention(block, where, activations.original)
    before = (after_attention(model.blocks[0], where, activations.original) - wanted).norm()
    assert (found - wanted).norm() < 0.02 * before


def test_a_fit_with_local_is_better():
    model = make_vit()
    _, plain, _ = fit(model=model, fitted=48)
    _, with_local, fits = fit(model=model, fitted=48, local=3)
    assert difference(model, with_local) < difference(model, plain)
    assert all(block.attn.local.weight.abs().max() > 0 for block in with_local.blocks)
    assert all(each.error_after < each.error_before for each in fits)


def test_descent_trains_the_convolution_too(monkeypatch):
    # Regression would change it as well.
    monkeypatch.setattr("linvit.conversion.fit._refit_with_local", lambda *_: None)
    model = make_vit(depth=1)
    converted = convert_vit(model, k=9, local=3)
    fit_layers(model, converted, make_activations(model), FitOptions(DescentOptions(steps=16, images=4, queries=16)))
    assert converted.blocks[0].attn.local.weight.abs().max() > 1e-4


def test_a_layer_that_returns_to_ordinary_attention_has_no_convolution():
    model, converted, fits = fit(FitOptions(DescentOptions(steps=0), max_error=1e-6), local=3)
    assert [each.k for each in fits] == [None] * 3
    assert not any(block.attn.local.weight.any() for block in converted.blocks)
    assert difference(model, converted) == 0
