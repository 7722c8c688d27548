"""Fitting a converted model to its original, layer by layer."""

import pytest
import torch
from kinds import KIND_SHARES
from timm.layers import LayerScale
from torch import nn
from vits import make_images, make_streams, make_vit

from linvit.conversion.closed_form import Moments, best_change, change, solutions, with_ones, without
from linvit.conversion.convert import convert_vit, projected_lengths
from linvit.conversion.descent import Descent
from linvit.conversion.fit import PATCHES_FITTED, FitOptions, _draw, fit_layers
from linvit.conversion.state import FitState
from linvit.conversion.streams import PREFIX_SHARE, token_weights

CLOSED_FORM = FitOptions(Descent(steps=0))
BOTH = FitOptions(Descent(steps=16, images=4, queries=16))


def fit(options=CLOSED_FORM, *, k=9, model=None, fitted=16, **kwargs):
    """Original, converted, what is known of its layers."""
    model = model or make_vit()
    torch.manual_seed(0)
    converted = convert_vit(model, k=k, **kwargs)
    fits = fit_layers(model, converted, make_streams(model, fitted=fitted), options)
    return model, converted, fits


@torch.no_grad()
def difference(model, converted):
    images = make_images(16, seed=7)
    return float((model.forward_features(images) - converted.forward_features(images)).norm())


@pytest.mark.parametrize(("kind", "share"), [pair for pair in KIND_SHARES if pair[0] != "identity"])
def test_every_kind_and_sharing_comes_nearer(kind, share):
    model, converted, fits = fit(BOTH, projection=kind, share=share)
    torch.manual_seed(0)
    unfitted = convert_vit(model, k=9, projection=kind, share=share)
    assert [each.layer for each in fits] == [0, 1, 2]
    assert all(each.error_after < each.error_before for each in fits)
    assert difference(model, converted) < 0.9 * difference(model, unfitted)
    assert all(attention.order is None for attention in (block.attn for block in converted.blocks))


def test_identity_stays_exact():
    model, converted, fits = fit(BOTH, projection="identity")
    assert [each.error_after for each in fits] == pytest.approx([0, 0, 0], abs=1e-6)
    assert difference(model, converted) < 1e-3


def test_descent_helps_where_the_closed_form_cannot():
    plain = fit(CLOSED_FORM)[2][0]
    descended = fit(FitOptions(Descent(steps=120, images=8, queries=32)), fitted=48)[2][0]
    assert descended.error_before == pytest.approx(plain.error_before, rel=0.2)
    assert descended.error_after < 0.9 * plain.error_after


def test_a_descent_that_goes_wrong_is_not_kept(monkeypatch):
    monkeypatch.setattr("linvit.conversion.descent.RATE", 10.0)
    assert fit(BOTH)[2] == fit(CLOSED_FORM)[2]


def test_some_patches_stand_for_all():
    tokens, counts = _draw(5 + 1000, 5, torch.Generator())
    assert len(tokens) == len(set(tokens.tolist())) == 5 + PATCHES_FITTED
    assert tokens[:5].tolist() == list(range(5))
    assert int(tokens.max()) < 1005
    assert counts[:5].tolist() == [1] * 5
    assert float(counts[5:].sum()) == pytest.approx(1000)
    tokens, counts = _draw(10, 1, torch.Generator())
    assert sorted(tokens.tolist()) == list(range(10))
    assert counts.tolist() == [1] * 10


def test_a_part_of_the_patches_teaches_about_as_much(monkeypatch):
    whole = fit(fitted=48)[2]
    monkeypatch.setattr("linvit.conversion.fit.PATCHES_FITTED", 16)
    part = fit(fitted=48)[2]
    for one, other in zip(part, whole):
        assert one.error_after < one.error_before
        assert one.block_error == pytest.approx(other.block_error, rel=0.1)
        assert one.block_error != other.block_error


def test_in_bfloat16_it_comes_as_near():
    model = make_vit()
    single, half = (convert_vit(model, k=9) for _ in range(2))
    exact = fit_layers(model, single, make_streams(model), CLOSED_FORM)
    streams = make_streams(model)
    streams.amp = True
    rounded = fit_layers(model, half, streams, CLOSED_FORM)
    assert streams.converted.dtype == torch.float32
    assert {value.dtype for value in half.state_dict().values()} == {torch.float32}
    for one, other in zip(rounded, exact):
        assert one.error_after == pytest.approx(other.error_after, rel=0.05)
        assert one.error_after != other.error_after
    assert difference(model, half) == pytest.approx(difference(model, single), rel=0.05)


def test_layers_before_the_first_that_is_converted_stay_as_they_are():
    model, converted, fits = fit(k=[None, 9, None])
    for name in ("attn.proj.weight", "mlp.fc2.weight"):
        untouched, projected, behind = (
            torch.equal(own.get_parameter(name), theirs.get_parameter(name))
            for own, theirs in zip(converted.blocks, model.blocks)
        )
        assert untouched
        assert not projected
        # Ordinary attention learns to undo what the layer before it did.
        assert not behind
    assert (fits[0].error_after, fits[0].cosine) == (0.0, pytest.approx(1.0))
    assert fits[2].error_after < fits[2].error_before


def test_a_layer_above_the_bound_goes_back_to_ordinary_attention():
    errors = [each.error_after for each in fit()[2]]
    bound = sorted(errors)[1] * 0.99
    model, converted, fits = fit(FitOptions(Descent(steps=0), max_error=bound))
    assert projected_lengths(converted) == [each.k for each in fits]
    assert None in projected_lengths(converted)
    assert all(each.error_after <= bound for each in fits if each.k is not None)
    # Its own weights are the original's again.
    assert fits[0].k is None
    assert torch.equal(converted.blocks[0].attn.proj.weight, model.blocks[0].attn.proj.weight)


def test_one_e_for_all_layers_stays_at_its_averages():
    model, converted, _ = fit(BOTH, share="layerwise")
    unfitted = convert_vit(model, k=9, share="layerwise")
    own, before = (each.blocks[0].attn.key_projection for each in (converted, unfitted))
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), before.parameters()))
    assert not torch.equal(converted.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_the_same_seed_gives_the_same_weights():
    first, again, other = (
        fit(FitOptions(Descent(steps=5, images=4, queries=8), seed=seed))[1].state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


class Stop(Exception):
    pass


@pytest.mark.parametrize("share", ["kv", "layerwise"])
def test_a_fit_that_was_stopped_goes_on(share, tmp_path):
    options = FitOptions(Descent(steps=5, images=4, queries=8), max_error=0.08)
    model = make_vit()
    whole = fit(options, share=share)
    assert [each.k for each in whole[2]] == [None, 9, 9]

    def begun(done_with):
        state = FitState(tmp_path / "out", {"k": 9, "sizes": (64, 64)})
        converted = convert_vit(model, k=9, share=share)
        done = state.load(converted)

        def report(each):
            state.save(each, converted)
            if each.layer == done_with:
                raise Stop

        return (
            len(done),
            converted,
            fit_layers(model, converted, make_streams(model), options, done=done, report=report),
        )

    for layer in (0, 1):
        with pytest.raises(Stop):
            begun(layer)
    num_done, converted, fits = begun(None)
    assert num_done == 2
    assert fits == whole[2]
    state = converted.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole[1].state_dict().items())
    with pytest.raises(
        ValueError, match=r"out was begun with another k: go on with the same, or delete .*\.out\.convert"
    ):
        FitState(tmp_path / "out", {"k": 16, "sizes": (64, 64)})
    FitState(tmp_path / "out", {"k": 9, "sizes": (64, 64)}).remove()
    assert list(tmp_path.iterdir()) == []


def test_settings_may_change_while_nothing_is_fitted(tmp_path):
    assert FitState(tmp_path / "out", {"k": 9}).plan(lambda: [9, None]) == [9, None]
    assert FitState(tmp_path / "out", {"k": 9}).plan(lambda: [16]) == [9, None]
    assert FitState(tmp_path / "out", {"k": 16}).plan(lambda: [16]) == [16]


def regression(width=6, out=3, rows=40):
    generator = torch.Generator().manual_seed(0)
    h, missing = (torch.randn(2, rows, size, generator=generator, dtype=torch.float64) for size in (width, out))
    weights = torch.rand(2, rows, generator=generator, dtype=torch.float64)
    moments = Moments.empty(width, out, torch.device("cpu"))
    for part in range(2):
        moments.add(h[part], missing[part], weights[part])
    return h.flatten(0, 1), missing.flatten(0, 1), weights.flatten(), moments


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_closed_form_is_weighted_ridge_regression(has_bias, monkeypatch):
    monkeypatch.setattr("linvit.conversion.closed_form.PENALTIES", (1e9, 0.3, 0.0))
    h, missing, weights, moments = regression()
    none, some, free = solutions(moments, has_bias=has_bias)
    rows = with_ones(h) if has_bias else h
    root = weights.sqrt()[:, None]
    expected = torch.linalg.lstsq(root * rows, root * missing).solution
    torch.testing.assert_close(free[: rows.shape[1]], expected)
    assert none[:-1].abs().max() < 1e-6
    assert none[:-1].norm() < some[:-1].norm() < free[:-1].norm()
    if not has_bias:
        assert free[-1].abs().max() == 0


def test_what_is_the_same_in_all_rows_leaves_only_the_penalised(monkeypatch):
    monkeypatch.setattr("linvit.conversion.closed_form.PENALTIES", (1.0, 0.0))
    moments = Moments.empty(6, 3, torch.device("cpu"))
    moments.add(torch.zeros(4, 6), torch.ones(4, 3), torch.ones(4))
    (found,) = solutions(moments, has_bias=True)
    assert found.tolist() == [[0.0] * 3] * 6 + [[1.0] * 3]


def test_the_change_is_what_gains_most_on_other_images():
    _, _, _, moments = regression()
    # The same images again, and others whose missing parts are the opposite.
    assert torch.equal(best_change(moments, moments, has_bias=True), list(solutions(moments, has_bias=True))[-1])
    opposite = Moments(moments.inputs, -moments.products)
    assert best_change(moments, opposite, has_bias=True).abs().max() == 0


def test_the_gain_is_what_is_missing_less():
    h, missing, weights, moments = regression()
    found = torch.randn(7, 3, dtype=torch.float64)
    left = missing - with_ones(h) @ found
    expected = (missing.square() - left.square()).sum(1) @ weights
    assert moments.gain(found) == pytest.approx(float(expected))


def test_a_change_goes_through_layer_scale():
    layer, scale = nn.Linear(6, 3).double(), LayerScale(3, init_values=1.0).double()
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([0.5, 2.0, 0.0]))
    h, found = torch.randn(5, 6, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    before = scale(layer(h))
    change(layer, scale, found)
    expected = with_ones(h) @ found
    expected[:, 2] = 0
    torch.testing.assert_close(scale(layer(h)) - before, expected)
    assert layer.weight.isfinite().all()


def test_what_enters_the_last_layer():
    attention = make_vit().blocks[0].attn
    x = torch.randn(2, 65, 32)
    expected = attention(x)
    with without(attention, "proj") as layer:
        h = attention(x)
    torch.testing.assert_close(layer(h), expected)
    assert attention.proj is layer


def test_a_tokens_error_is_relative_and_prefix_tokens_have_their_share():
    tokens = torch.randn(2, 21, 8) * torch.logspace(0, 3, 21)[:, None]
    shares = token_weights(tokens, 1) * tokens.square().sum(-1)
    assert shares.mean() == pytest.approx(1.0)
    assert shares[:, 0].sum() / shares.sum() == pytest.approx(PREFIX_SHARE)
    torch.testing.assert_close(token_weights(tokens, 0), 1 / tokens.square().sum(-1))
