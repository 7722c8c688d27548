"""End-to-end distillation of a converted model."""

import itertools

import pytest
import torch
from vits import make_images, make_rotary, make_vit

from linvit.conversion.comparison import Comparison
from linvit.conversion.convert import convert_vit
from linvit.conversion.distil import DistilOptions, distil, distillation_loss


def distilled(options, model=None, **kwargs):
    model = model or make_vit()
    converted = convert_vit(model, k=9)
    unseen = Comparison(model, make_images(8, seed=5), batch_size=2)
    before = unseen.fidelity(converted)
    batches = itertools.cycle(make_images(32, seed=6).split(8))
    return model, converted, before, distil(model, converted, batches, unseen, options, **kwargs)


def test_distillation_improves_fidelity():
    reports = []
    model, converted, before, after = distilled(DistilOptions(steps=40, rate=1e-3), report=reports.append)
    assert 1 - after.mean_cosine < 0.7 * (1 - before.mean_cosine)
    assert after == Comparison(model, make_images(8, seed=5), batch_size=2).fidelity(converted)
    assert reports == pytest.approx([(step + 1) / 40 for step in range(40)])
    assert not converted.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_distillation_of_features_improves_fidelity():
    _, _, before, after = distilled(DistilOptions(steps=20, rate=1e-3, loss="features", accumulate=2))
    assert 1 - after.mean_cosine < 0.7 * (1 - before.mean_cosine)


@pytest.mark.parametrize("make", [make_vit, make_rotary])
@torch.no_grad()
def test_the_loss_of_features_is_that_of_their_cosines(make):
    model = make(num_classes=0)
    other, images = convert_vit(model, k=9), make_images(3)
    own, target = other.forward_features(images), model.forward_features(images)
    cosines = [torch.cosine_similarity(own[:, index], target[:, index], dim=-1).mean() for index in range(own.shape[1])]
    first = model.num_prefix_tokens
    difference = (own - target)[:, first:].abs()
    smooth = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
    expected = (1 - cosines[0]) + 0.9 * (1 - torch.stack(cosines[first:]).mean()) + 0.1 * smooth
    assert distillation_loss(model, other, images, "features") == pytest.approx(float(expected), rel=1e-4)


def test_gradients_of_a_step_are_summed():
    model, images = make_vit(), make_images(8, seed=6)

    def weights(batches, **options):
        converted = convert_vit(model, k=9)
        unseen = Comparison(model, make_images(8, seed=5), batch_size=2)
        distil(model, converted, iter(batches), unseen, DistilOptions(steps=1, rate=1e-3, **options))
        return converted.blocks[0].attn.qkv.weight

    torch.testing.assert_close(weights(images.split(4), accumulate=2), weights([images]), rtol=0, atol=1e-6)


def test_distillation_in_bfloat16_improves_fidelity_too():
    model, converted, before, after = distilled(DistilOptions(steps=40, rate=1e-3, amp=True))
    assert 1 - after.mean_cosine < 0.7 * (1 - before.mean_cosine)
    assert all(parameter.dtype == torch.float32 for parameter in converted.parameters())
    # The final comparison is not in bfloat16, in which even equal models differ.
    assert after == Comparison(model, make_images(8, seed=5), batch_size=2).fidelity(converted)


def test_a_diverging_training_is_discarded():
    model, converted, before, after = distilled(DistilOptions(steps=3, rate=10.0))
    assert after == before
    expected = convert_vit(model, k=9).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in converted.state_dict().items())


def test_minutes_end_by_the_clock(monkeypatch):
    seconds = itertools.count(0, 7)
    monkeypatch.setattr("linvit.conversion.distil.time.monotonic", lambda: next(seconds))
    _, _, before, after = distilled(DistilOptions(minutes=1.0, rate=1e-3))
    assert after.mean_cosine >= before.mean_cosine


@pytest.mark.parametrize("num_classes", [5, 0])
@pytest.mark.parametrize("make", [make_vit, make_rotary])
@torch.no_grad()
def test_the_loss_is_zero_for_equal_models(make, num_classes):
    model = make(num_classes=num_classes)
    same, other = convert_vit(model, projection="identity"), convert_vit(model, k=9)
    images = make_images(3)
    assert distillation_loss(model, same, images) == pytest.approx(0, abs=1e-6)
    assert distillation_loss(model, other, images) > 1e-3
