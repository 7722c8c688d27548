"""The solvers that fit one layer: ridge regression in closed form."""

import pytest
import torch
from torch import nn
from vits import make_vit

from linvit.conversion.solvers import (
    Moments,
    add_change,
    best_change,
    replaced_by_identity,
    ridge_solutions,
    with_ones,
)


def regression(width=6, out=3, rows=40):
    generator = torch.Generator().manual_seed(0)
    h, residual = (torch.randn(2, rows, size, generator=generator, dtype=torch.float64) for size in (width, out))
    weights = torch.rand(2, rows, generator=generator, dtype=torch.float64)
    moments = Moments.empty(width, out, torch.device("cpu"))
    for part in range(2):
        moments.add(h[part], residual[part], weights[part])
    return h.flatten(0, 1), residual.flatten(0, 1), weights.flatten(), moments


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_closed_form_is_weighted_ridge_regression(has_bias, monkeypatch):
    monkeypatch.setattr("linvit.conversion.solvers.PENALTIES", (1e9, 0.3, 0.0))
    h, residual, weights, moments = regression()
    strong, medium, none = ridge_solutions(moments, has_bias=has_bias)
    rows = with_ones(h) if has_bias else h
    root = weights.sqrt()[:, None]
    expected = torch.linalg.lstsq(root * rows, root * residual).solution
    torch.testing.assert_close(none[: rows.shape[1]], expected)
    assert strong[:-1].abs().max() < 1e-6
    assert strong[:-1].norm() < medium[:-1].norm() < none[:-1].norm()
    if not has_bias:
        assert none[-1].abs().max() == 0


def test_a_constant_input_changes_only_the_bias(monkeypatch):
    monkeypatch.setattr("linvit.conversion.solvers.PENALTIES", (1.0, 0.0))
    moments = Moments.empty(6, 3, torch.device("cpu"))
    moments.add(torch.zeros(4, 6), torch.ones(4, 3), torch.ones(4))
    (change,) = ridge_solutions(moments, has_bias=True)
    assert change.tolist() == [[0.0] * 3] * 6 + [[1.0] * 3]


def test_the_best_change_gains_most_on_held_out_images():
    _, _, _, moments = regression()
    # First the same images, then images with the opposite residuals.
    assert torch.equal(best_change(moments, moments, has_bias=True), list(ridge_solutions(moments, has_bias=True))[-1])
    opposite = Moments(moments.inputs, -moments.products)
    assert best_change(moments, opposite, has_bias=True).abs().max() == 0


def test_the_gain_is_the_decrease_of_the_squared_residuals():
    h, residual, weights, moments = regression()
    change = torch.randn(7, 3, dtype=torch.float64)
    left = residual - with_ones(h) @ change
    expected = (residual.square() - left.square()).sum(1) @ weights
    assert moments.gain(change) == pytest.approx(float(expected))


def test_a_change_is_divided_by_layer_scale():
    layer, gamma = nn.Linear(6, 3).double(), torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    h, change = torch.randn(5, 6, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    before = gamma * layer(h)
    add_change(layer, gamma, change)
    expected = with_ones(h) @ change
    expected[:, 2] = 0
    torch.testing.assert_close(gamma * layer(h) - before, expected)
    assert layer.weight.isfinite().all()


def test_a_replaced_layer_shows_its_input():
    attention = make_vit().blocks[0].attn
    x = torch.randn(2, 65, 32)
    expected = attention(x)
    with replaced_by_identity(attention, "proj") as layer:
        h = attention(x)
    torch.testing.assert_close(layer(h), expected)
    assert attention.proj is layer
