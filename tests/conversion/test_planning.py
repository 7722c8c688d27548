"""`--k plan`: a projected length for each layer, chosen by its cost and error."""

import pytest
import torch
from vits import make_activations, make_images, make_rotary, make_vit

from linvit.conversion import planning
from linvit.conversion.convert import convert_vit
from linvit.conversion.layer_times import LayerTimes, measure_layer_times
from linvit.conversion.planning import Offer, _choose, _flops, _offers, plan_lengths


def plan(speedup, model=None, **kwargs):
    # Long sequences of a narrow model, where attention is most of the work.
    model = model or make_vit(patch_size=4, mlp_ratio=1.0)
    settings = {"projection": "separable", "share": "kv", "by": "flops", **kwargs}
    return plan_lengths(model, make_activations(model, fitted=2, held_out=1).original, speedup=speedup, **settings)


def cost(lengths):
    """The number of keys, which ranks plans for the same model."""
    return sum(256 if k is None else k for k in lengths)


def test_a_higher_speedup_gives_shorter_lengths():
    plans = [plan(speedup) for speedup in (1.05, 1.5, 2.0)]
    assert [cost(lengths) for lengths in plans] == sorted((cost(lengths) for lengths in plans), reverse=True)
    assert len({cost(lengths) for lengths in plans}) == 3
    assert all(k is None or 16 <= k < 256 for lengths in plans for k in lengths)


def test_rotary_models_are_planned():
    lengths = plan(1.3, make_rotary(patch_size=4, mlp_ratio=1.0))
    assert 16 <= min(k for k in lengths if k is not None) < 256


def test_attention_has_a_larger_share_of_the_cost_at_a_larger_size():
    here, there = plan(1.5), plan(1.5, target_size=(128, 128))
    assert cost(there) > cost(here)
    model = make_vit(patch_size=4, mlp_ratio=1.0)
    converted = convert_vit(model, k=there)
    assert _flops(model, (128, 128)) > 1.5 * _flops(converted, (128, 128))
    assert _flops(model, None) < 1.5 * _flops(converted, None)


def test_layers_that_lose_nothing_are_shortened_first():
    model = make_vit(patch_size=4, mlp_ratio=1.0)
    with torch.no_grad():
        # A layer with zero queries attends to all tokens equally, so pooling loses nothing.
        attention = model.blocks[1].attn
        attention.qkv.weight[:32] = 0
        attention.qkv.bias[:32] = 0
    lengths = plan(1.4, model)
    # All of its lengths have the same error, except for rounding.
    assert lengths[1] is not None
    assert all(k is None or k > lengths[1] for k in (lengths[0], lengths[2]))


@torch.no_grad()
def test_errors_are_measured_on_the_last_tokens():
    model, images = make_vit(patch_size=4, mlp_ratio=1.0), make_images(4)
    lengths = [16, 36, 64]
    activations = make_activations(model, fitted=0, held_out=4)
    costs = {k: 1.0 for k in (None, *lengths)}
    offers = list(_offers(model, activations, costs, lengths, projection="separable", share="kv"))
    target = model.forward_features(images)
    for layer, (_, middle, _, ordinary) in enumerate(offers):
        tokens = convert_vit(model, k=[36 if each == layer else None for each in range(3)]).forward_features(images)
        relative = (tokens - target).square().sum(-1) / target.square().sum(-1)
        assert middle.error == pytest.approx(float(relative[:, 0].mean() + relative[:, 1:].mean()), rel=1e-3)
        assert ordinary.error == 0


def test_a_plan_by_time_spends_measured_seconds(monkeypatch):
    seconds = {None: 10.0, 16: 6.0, 24: 6.5, 42: 10.0, 63: 11.0, 96: 12.0, 165: 13.0}
    asked = []

    def measured(model, lengths, **settings):
        asked.append(settings)
        return LayerTimes({k: seconds[k] for k in (None, *lengths)}, rest=6.0)

    monkeypatch.setattr(planning, "measure_layer_times", measured)
    lengths = plan(1.2, by="time", local=3, target_size=(128, 128))
    # 3 layers of 10 s and a rest of 6 s may take 30 s; lengths no faster than ordinary attention are never taken.
    assert set(lengths) <= {None, 16, 24}
    assert sum(seconds[k] for k in lengths) + 6 <= 36 / 1.2
    assert sum(k is None for k in lengths) == 1
    assert asked == [dict(projection="separable", share="kv", local=3, img_size=(128, 128), amp=False, batch_size=1)]
    seconds |= {42: 4.0}
    with pytest.raises(ValueError, match=r"--speedup 50 cannot be reached: k=42 in every layer gives 2\.00"):
        plan(50, by="time")
    seconds |= {16: 10.0, 24: 10.5, 42: 11.0}
    with pytest.raises(ValueError, match="at 64x64 no length is faster than ordinary attention on this device"):
        plan(1.2, by="time")


@pytest.mark.parametrize("make", [make_vit, make_rotary])
def test_layer_times_are_of_the_size_that_is_planned_for(make):
    model = make(patch_size=4, mlp_ratio=1.0)
    small = measure_layer_times(model, [16], projection="separable", share="kv")
    large = measure_layer_times(model, [16], projection="separable", share="kv", local=3, img_size=(192, 192))
    assert small.attention.keys() == large.attention.keys() == {None, 16}
    # Timed in the same rounds: 2,304 patches, of which 16 keys are made.
    assert large.attention[16] < 0.5 * large.attention[None]
    assert small.per_layer(16, depth=3) == pytest.approx(small.attention[16] + small.rest / 3)


def test_layerwise_sharing_has_one_length():
    lengths = plan(1.3, share="layerwise")
    assert len({k for k in lengths if k is not None}) == 1


def test_an_unreachable_speedup_is_refused():
    with pytest.raises(ValueError, match=r"--speedup 50 cannot be reached: k=16 in every layer gives \d"):
        plan(50)
    with pytest.raises(ValueError, match="4×4 patches are too few; choose a larger --img-size"):
        plan(1.2, make_vit(patch_size=16))


def test_the_plan_has_the_least_error_within_the_budget():
    offers = [
        [Offer(16, 1.0, 5.0), Offer(64, 4.0, 1.0), Offer(None, 10.0, 0.0)],
        [Offer(16, 1.0, 0.1), Offer(64, 4.0, 0.05), Offer(None, 10.0, 0.0)],
    ]
    assert [offer.k for offer in _choose(offers, 20)] == [None, None]
    assert [offer.k for offer in _choose(offers, 11)] == [None, 16]
    assert [offer.k for offer in _choose(offers, 5)] == [64, 16]
    assert [offer.k for offer in _choose(offers, 2)] == [16, 16]
    assert _choose(offers, 1.9) is None


def test_layers_are_planned_together() -> None:
    # By error per operation the second layer would be shortened first, and then the first as well.
    offers = [
        [Offer(16, 4.0, 3.0), Offer(None, 10.0, 0.0)],
        [Offer(16, 6.0, 1.0), Offer(None, 10.0, 0.0)],
    ]
    assert [offer.k for offer in _choose(offers, 15)] == [16, None]
