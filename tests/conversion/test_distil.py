"""End-to-end distillation, fidelity, and how fast a converted model is."""

import itertools

import pytest
import torch
from vits import make_images, make_vit

import linvit.conversion.speed
from linvit.conversion.convert import convert_vit
from linvit.conversion.distil import Comparison, DistilOptions, Fidelity, distil, loss
from linvit.conversion.speed import at_size, measure_speed, model_spec
from linvit.model.build import build, parse_spec


def compare(model, converted, images) -> Fidelity:
    return Comparison(model, images, batch_size=2).of(converted)


def distilled(options, model=None, **kwargs):
    model = model or make_vit()
    converted = convert_vit(model, k=9)
    held_out = Comparison(model, make_images(8, seed=5), batch_size=2)
    before = held_out.of(converted)
    batches = itertools.cycle(make_images(32, seed=6).split(8))
    return model, converted, before, distil(model, converted, batches, held_out, options, **kwargs)


def test_distillation_comes_nearer():
    reports = []
    model, converted, before, after = distilled(DistilOptions(steps=40, rate=1e-3), report=reports.append)
    assert 1 - after.mean_cosine < 0.7 * (1 - before.mean_cosine)
    assert after == compare(model, converted, make_images(8, seed=5))
    assert reports == pytest.approx([(step + 1) / 40 for step in range(40)])
    assert not converted.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_distillation_in_bfloat16_comes_nearer_too():
    model, converted, before, after = distilled(DistilOptions(steps=40, rate=1e-3, amp=True))
    assert 1 - after.mean_cosine < 0.7 * (1 - before.mean_cosine)
    assert all(parameter.dtype == torch.float32 for parameter in converted.parameters())
    # The comparison in the end is not in bfloat16, in which equal models would differ.
    assert after == compare(model, converted, make_images(8, seed=5))


def test_what_does_harm_is_not_kept():
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
@torch.no_grad()
def test_nothing_is_lost_between_equals(num_classes):
    model = make_vit(num_classes=num_classes)
    same, other = convert_vit(model, projection="identity"), convert_vit(model, k=9)
    images = make_images(3)
    assert loss(model, same, images) == pytest.approx(0, abs=1e-6)
    assert loss(model, other, images) > 1e-3
    fidelity = compare(model, same, images)
    assert fidelity.num_images == 3
    assert fidelity.cosines == pytest.approx([1, 1, 1])
    rounded = Comparison(model, images, batch_size=2).of(same, amp=True)
    assert rounded.cosines == pytest.approx([1, 1, 1], abs=1e-3)
    assert rounded.cosines != fidelity.cosines
    assert fidelity.top1_agreement == (1.0 if num_classes else None)


@torch.no_grad()
def test_fidelity_is_of_what_there_is():
    model = make_vit("vit_base_patch16_siglip_224")
    converted = convert_vit(model, k=9)
    images = make_images(3)
    fidelity = compare(model, converted, images)
    theirs, own = (each.forward_features(images) for each in (model, converted))
    assert fidelity.class_cosine is None
    assert fidelity.patch_cosine == pytest.approx(float(torch.cosine_similarity(theirs, own, dim=2).mean()), abs=1e-5)
    pooled = (each.forward_head(tokens, pre_logits=True) for each, tokens in ((model, theirs), (converted, own)))
    assert fidelity.feature_cosine == pytest.approx(float(torch.cosine_similarity(*pooled).mean()), abs=1e-5)
    agreeing = (model(images).argmax(1) == converted(images).argmax(1)).float().mean()
    assert fidelity.top1_agreement == pytest.approx(float(agreeing))


def test_both_are_timed_at_the_size_and_left_as_they_are(monkeypatch):
    monkeypatch.setattr(linvit.conversion.speed, "can_read_peaks", lambda: False)
    model = make_vit()
    converted = convert_vit(model, k=9)
    rounds = []
    speed = measure_speed(model, converted, (128, 96), rounds=3, report=rounds.append)
    assert (speed.patches, speed.rounds, rounds) == (192, 3, [0, 1, 2])
    assert speed.spread[0] <= speed.times_faster <= speed.spread[1]
    assert speed.original_bytes is None
    assert model.patch_embed.img_size == converted.patch_embed.img_size == (64, 64)


def test_a_batch_can_be_timed_in_bfloat16(monkeypatch):
    monkeypatch.setattr(linvit.conversion.speed, "can_read_peaks", lambda: False)
    model, seen = make_vit(), set()
    model.patch_embed.register_forward_hook(lambda _, args, out: seen.add((len(args[0]), out.dtype)))
    speed = measure_speed(model, convert_vit(model, k=9), (64, 64), rounds=1, batch_size=3, amp=True)
    assert (speed.batch_size, speed.dtype) == (3, "bfloat16")
    assert (3, torch.bfloat16) in seen


def test_a_spec_builds_the_same_model_at_another_size():
    converted = convert_vit(make_vit(act_layer="quick_gelu", img_size=(64, 64)), k=[9, None, 16])
    again = build(parse_spec(model_spec(converted)), (96, 96))
    expected = at_size(converted, (96, 96))
    shapes = ({name: value.shape for name, value in each.state_dict().items()} for each in (again, expected))
    assert next(shapes) == next(shapes)
    assert type(again.blocks[0].mlp.act) is type(expected.blocks[0].mlp.act)
