"""Fitting a converted model to its original, layer by layer."""

import pytest
import torch
from kinds import KIND_SHARES
from vits import make_activations, make_images, make_rotary, make_vit

from linvit.conversion.convert import convert_vit, projected_lengths
from linvit.conversion.fit import PATCHES_FITTED, FitOptions, _sample_tokens, fit_layers
from linvit.conversion.solvers import DescentOptions

CLOSED_FORM = FitOptions(DescentOptions(steps=0))
BOTH = FitOptions(DescentOptions(steps=16, images=4, queries=16))


def fit(options=CLOSED_FORM, *, k=9, model=None, fitted=16, **kwargs):
    """The original, the converted model and the fits of its layers."""
    model = model or make_vit()
    torch.manual_seed(0)
    converted = convert_vit(model, k=k, **kwargs)
    fits = fit_layers(model, converted, make_activations(model, fitted=fitted), options)
    return model, converted, fits


@torch.no_grad()
def difference(model, converted):
    images = make_images(16, seed=7)
    return float((model.forward_features(images) - converted.forward_features(images)).norm())


@pytest.mark.parametrize(("kind", "share"), [pair for pair in KIND_SHARES if pair[0] != "identity"])
def test_a_fit_improves_every_kind_and_sharing(kind, share):
    model, converted, fits = fit(BOTH, projection=kind, share=share)
    torch.manual_seed(0)
    unfitted = convert_vit(model, k=9, projection=kind, share=share)
    assert [each.layer for each in fits] == [0, 1, 2]
    assert all(each.error_after < each.error_before for each in fits)
    assert difference(model, converted) < 0.9 * difference(model, unfitted)
    assert all(attention.order is None for attention in (block.attn for block in converted.blocks))


@pytest.mark.parametrize("kind", ["separable", "maxpool"])
def test_a_fit_improves_rotary_models(kind):
    for name in ("vit_small_patch16_dinov3", "eva02_small_patch14_224", "vit_small_patch16_rope_mixed_224"):
        model = make_rotary(name)
        _, converted, fits = fit(BOTH, model=model, projection=kind)
        torch.manual_seed(0)
        unfitted = convert_vit(model, k=9, projection=kind)
        assert all(each.error_after < each.error_before for each in fits)
        assert difference(model, converted) < 0.9 * difference(model, unfitted)


def test_the_fit_sees_the_tokens_of_the_converted_model():
    model = make_rotary("vit_small_patch16_rope_mixed_224", depth=1)
    converted, activations = convert_vit(model, k=9), make_activations(model, fitted=8, held_out=4)
    with torch.no_grad():
        converted.rope.freqs.mul_(1.5)
        fit_layers(model, converted, activations, CLOSED_FORM)
        found, expected = converted.norm(activations.converted), converted.forward_features(make_images(12))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_identity_stays_exact():
    model, converted, fits = fit(BOTH, projection="identity")
    assert [each.error_after for each in fits] == pytest.approx([0, 0, 0], abs=1e-6)
    assert difference(model, converted) < 1e-3


def test_descent_helps_where_the_closed_form_cannot():
    plain = fit(CLOSED_FORM)[2][0]
    descended = fit(FitOptions(DescentOptions(steps=120, images=8, queries=32)), fitted=48)[2][0]
    assert descended.error_before == pytest.approx(plain.error_before, rel=0.2)
    assert descended.error_after < 0.9 * plain.error_after


def test_a_diverging_descent_is_discarded(monkeypatch):
    monkeypatch.setattr("linvit.conversion.solvers.RELATIVE_RATE", 10.0)
    assert fit(BOTH)[2] == fit(CLOSED_FORM)[2]


def test_sampled_patches_represent_all_patches():
    tokens, counts = _sample_tokens(5 + 1000, 5, torch.Generator())
    assert len(tokens) == len(set(tokens.tolist())) == 5 + PATCHES_FITTED
    assert tokens[:5].tolist() == list(range(5))
    assert int(tokens.max()) < 1005
    assert counts[:5].tolist() == [1] * 5
    assert float(counts[5:].sum()) == pytest.approx(1000)
    tokens, counts = _sample_tokens(10, 1, torch.Generator())
    assert sorted(tokens.tolist()) == list(range(10))
    assert counts.tolist() == [1] * 10


def test_a_sample_of_the_patches_fits_about_as_well(monkeypatch):
    full = fit(fitted=48)[2]
    monkeypatch.setattr("linvit.conversion.fit.PATCHES_FITTED", 16)
    sampled = fit(fitted=48)[2]
    for one, other in zip(sampled, full):
        assert one.error_after < one.error_before
        assert one.block_error == pytest.approx(other.block_error, rel=0.1)
        assert one.block_error != other.block_error


def test_bfloat16_fits_about_as_well():
    model = make_vit()
    single, half = (convert_vit(model, k=9) for _ in range(2))
    exact = fit_layers(model, single, make_activations(model), CLOSED_FORM)
    activations = make_activations(model)
    activations.amp = True
    rounded = fit_layers(model, half, activations, CLOSED_FORM)
    assert activations.converted.dtype == torch.float32
    assert {value.dtype for value in half.state_dict().values()} == {torch.float32}
    for one, other in zip(rounded, exact):
        assert one.error_after == pytest.approx(other.error_after, rel=0.05)
        assert one.error_after != other.error_after
    assert difference(model, half) == pytest.approx(difference(model, single), rel=0.05)


def test_layers_before_the_first_projected_one_do_not_change():
    model, converted, fits = fit(k=[None, 9, None])
    for name in ("attn.proj.weight", "mlp.fc2.weight"):
        before, projected, after = (
            torch.equal(fitted.get_parameter(name), original.get_parameter(name))
            for fitted, original in zip(converted.blocks, model.blocks)
        )
        assert before
        assert not projected
        # Ordinary attention learns to correct the errors of the layer before it.
        assert not after
    assert (fits[0].error_after, fits[0].cosine) == (0.0, pytest.approx(1.0))
    assert fits[2].error_after < fits[2].error_before


def test_a_layer_above_the_largest_error_returns_to_ordinary_attention():
    errors = [each.error_after for each in fit()[2]]
    bound = sorted(errors)[1] * 0.99
    model, converted, fits = fit(FitOptions(DescentOptions(steps=0), max_error=bound))
    assert projected_lengths(converted) == [each.k for each in fits]
    assert None in projected_lengths(converted)
    assert all(each.error_after <= bound for each in fits if each.k is not None)
    # It has the original's weights again.
    assert fits[0].k is None
    assert torch.equal(converted.blocks[0].attn.proj.weight, model.blocks[0].attn.proj.weight)


def test_an_e_shared_by_all_layers_stays_at_its_averages():
    model, converted, _ = fit(BOTH, share="layerwise")
    unfitted = convert_vit(model, k=9, share="layerwise")
    fitted, before = (each.blocks[0].attn.key_projection for each in (converted, unfitted))
    assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), before.parameters()))
    assert not torch.equal(converted.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_the_same_seed_gives_the_same_weights():
    first, again, other = (
        fit(FitOptions(DescentOptions(steps=5, images=4, queries=8), seed=seed))[1].state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
