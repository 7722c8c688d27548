"""`--k plan`: a projected length for each layer, by what is lost there."""

import pytest
import torch
from vits import make_images, make_streams, make_vit

from linvit.conversion.convert import convert_vit
from linvit.conversion.planning import Offer, _choose, _flops, _offers, plan_lengths


def plan(speedup, model=None, **kwargs):
    # Long sequences of a narrow model, where attention is most of the work.
    model = model or make_vit(patch_size=4, mlp_ratio=1.0)
    settings = {"projection": "separable", "share": "kv", **kwargs}
    return plan_lengths(model, make_streams(model, fitted=2, held_out=1).original, speedup=speedup, **settings)


def cost(lengths):
    """The more keys, the more: good enough to compare plans of the same layers."""
    return sum(256 if k is None else k for k in lengths)


def test_the_faster_the_shorter():
    plans = [plan(speedup) for speedup in (1.05, 1.5, 2.0)]
    assert [cost(lengths) for lengths in plans] == sorted((cost(lengths) for lengths in plans), reverse=True)
    assert len({cost(lengths) for lengths in plans}) == 3
    assert all(k is None or 16 <= k < 256 for lengths in plans for k in lengths)


def test_at_a_larger_size_attention_is_more_of_the_work():
    here, there = plan(1.5), plan(1.5, at=(128, 128))
    assert cost(there) > cost(here)
    model = make_vit(patch_size=4, mlp_ratio=1.0)
    converted = convert_vit(model, k=there)
    assert _flops(model, (128, 128)) > 1.5 * _flops(converted, (128, 128))
    assert _flops(model, None) < 1.5 * _flops(converted, None)


def test_layers_that_lose_nothing_are_shortened_first():
    model = make_vit(patch_size=4, mlp_ratio=1.0)
    with torch.no_grad():
        # A layer whose queries are nothing attends to all alike, and its average needs no detail.
        attention = model.blocks[1].attn
        attention.qkv.weight[:32] = 0
        attention.qkv.bias[:32] = 0
    lengths = plan(1.4, model)
    # All of its lengths lose nothing but rounding.
    assert lengths[1] is not None
    assert all(k is None or k > lengths[1] for k in (lengths[0], lengths[2]))


@torch.no_grad()
def test_errors_are_those_of_the_last_tokens():
    model, images = make_vit(patch_size=4, mlp_ratio=1.0), make_images(4)
    lengths = [16, 36, 64]
    streams = make_streams(model, fitted=0, held_out=4)
    offers = list(_offers(model, streams, lengths, projection="separable", share="kv"))
    wanted = model.forward_features(images)
    for layer, (_, middle, _, ordinary) in enumerate(offers):
        found = convert_vit(model, k=[36 if each == layer else None for each in range(3)]).forward_features(images)
        relative = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
        assert middle.error == pytest.approx(float(relative[:, 0].mean() + relative[:, 1:].mean()), rel=1e-3)
        assert ordinary.error == 0


def test_layerwise_sharing_has_one_length():
    lengths = plan(1.3, share="layerwise")
    assert len({k for k in lengths if k is not None}) == 1


def test_a_budget_that_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match=r"--speedup 50 cannot be reached: k=16 in every layer gives \d"):
        plan(50)
    with pytest.raises(ValueError, match="4×4 patches are too few; choose a larger --img-size"):
        plan(1.2, make_vit(patch_size=16))


def test_the_least_error_for_what_is_saved():
    offers = [
        [Offer(16, 1.0, 5.0), Offer(64, 4.0, 1.0), Offer(None, 10.0, 0.0)],
        [Offer(16, 1.0, 0.1), Offer(64, 4.0, 0.05), Offer(None, 10.0, 0.0)],
    ]
    assert [offer.k for offer in _choose(offers, 20)] == [None, None]
    assert [offer.k for offer in _choose(offers, 11)] == [None, 16]
    assert [offer.k for offer in _choose(offers, 5)] == [64, 16]
    assert [offer.k for offer in _choose(offers, 2)] == [16, 16]
    assert _choose(offers, 1.9) is None


def test_offers_are_chosen_together() -> None:
    # By error per operation the second layer would be shortened first, and then the first as well.
    offers = [
        [Offer(16, 4.0, 3.0), Offer(None, 10.0, 0.0)],
        [Offer(16, 6.0, 1.0), Offer(None, 10.0, 0.0)],
    ]
    assert [offer.k for offer in _choose(offers, 15)] == [16, None]
