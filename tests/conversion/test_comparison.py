"""The fidelity and speed of a converted model, compared with its original."""

import pytest
import torch
from vits import make_images, make_vit

import linvit.conversion.comparison
from linvit.conversion.comparison import Comparison, Fidelity, measure_speed, model_spec, resized_copy
from linvit.conversion.convert import convert_vit
from linvit.model.build import build, parse_spec


def compare(model, converted, images) -> Fidelity:
    return Comparison(model, images, batch_size=2).fidelity(converted)


@pytest.mark.parametrize("num_classes", [5, 0])
@torch.no_grad()
def test_equal_models_have_full_fidelity(num_classes):
    model = make_vit(num_classes=num_classes)
    same = convert_vit(model, projection="identity")
    images = make_images(3)
    fidelity = compare(model, same, images)
    assert fidelity.num_images == 3
    assert fidelity.cosines == pytest.approx([1, 1, 1])
    rounded = Comparison(model, images, batch_size=2).fidelity(same, amp=True)
    assert rounded.cosines == pytest.approx([1, 1, 1], abs=1e-3)
    assert rounded.cosines != fidelity.cosines
    assert fidelity.top1_agreement == (1.0 if num_classes else None)


@torch.no_grad()
def test_fidelity_omits_absent_outputs():
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


def test_both_models_are_timed_on_resized_copies(monkeypatch):
    monkeypatch.setattr(linvit.conversion.comparison, "can_read_peaks", lambda: False)
    model = make_vit()
    converted = convert_vit(model, k=9)
    rounds = []
    speed = measure_speed(model, converted, (128, 96), rounds=3, report=rounds.append)
    assert (speed.patches, speed.rounds, rounds) == (192, 3, [0, 1, 2])
    assert speed.spread[0] <= speed.times_faster <= speed.spread[1]
    assert speed.original_bytes is None
    assert model.patch_embed.img_size == converted.patch_embed.img_size == (64, 64)


def test_a_batch_can_be_timed_in_bfloat16(monkeypatch):
    monkeypatch.setattr(linvit.conversion.comparison, "can_read_peaks", lambda: False)
    model, seen = make_vit(), set()
    model.patch_embed.register_forward_hook(lambda _, args, out: seen.add((len(args[0]), out.dtype)))
    speed = measure_speed(model, convert_vit(model, k=9), (64, 64), rounds=1, batch_size=3, amp=True)
    assert (speed.batch_size, speed.dtype) == (3, "bfloat16")
    assert (3, torch.bfloat16) in seen


def test_a_spec_builds_the_same_model_at_another_size():
    converted = convert_vit(make_vit(act_layer="quick_gelu", img_size=(64, 64)), k=[9, None, 16])
    again = build(parse_spec(model_spec(converted)), (96, 96))
    expected = resized_copy(converted, (96, 96))
    shapes = ({name: value.shape for name, value in each.state_dict().items()} for each in (again, expected))
    assert next(shapes) == next(shapes)
    assert type(again.blocks[0].mlp.act) is type(expected.blocks[0].mlp.act)
