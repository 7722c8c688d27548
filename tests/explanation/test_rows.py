"""The 8 bit factors of a page give the rows of the attention matrix, for every kind, sharing and pooling."""

import numpy as np
import pytest
import timm
import torch
from kinds import FIXED, REDUCING
from small_vits import PER_LAYER, PREFIXES, images, make
from unpacked import Unpacked, token_row

from linvit.explanation.maps import Explanation, weighted_rows
from linvit.explanation.rows import Pack, RowPlan, pack_attention, pack_projections, plan_rows, quantise

KINDS = ["linear", "separable", "avgpool", "dct", *REDUCING]
CASES = [(kind, share) for kind in KINDS for share in PER_LAYER if kind not in FIXED or share in ("kv", "layerwise")]
LARGE = 10**9


def look(model):
    for name, parameter in model.named_parameters():
        if "qkv" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return Explanation(model, images(batch=1), None, with_gradients=False)


def packed(seen, plan):
    shared, own = Pack(), Pack()
    model = pack_projections(shared, seen, with_projections=plan.has_projections)
    layers = pack_attention(own, seen, plan, with_rows=plan.num_images > 0)
    return model, Unpacked(shared.text()), Unpacked(own.text()), layers


def exact_row(layer, token):
    one = torch.zeros(layer.queries.shape[2])
    one[token] = 1
    return layer.to_tokens(weighted_rows(layer, one)).mean(0).detach().numpy()


@pytest.mark.parametrize(("each_head", "prefix"), [(True, "class and 4 registers"), (False, "no prefix")])
@pytest.mark.parametrize(("kind", "share"), CASES)
def test_rows_are_exact_to_rounding(kind, share, prefix, each_head):
    seen = look(make(projection=kind, share=share, k=PER_LAYER[share], **PREFIXES[prefix]))
    plan = RowPlan(True, 1, each_head=each_head, ordinary=True, complete=0)
    model, shared, own, places = packed(seen, plan)
    for number, layer in enumerate(seen.layers):
        num_tokens = layer.queries.shape[2]
        rows = places[number]["tokens"]["values"]["shape"][0]
        has_mean = not each_head and (layer.projection is None or layer.projection.num_maps == 1)
        assert rows == (1 if has_mean else layer.num_heads)
        for token in (0, num_tokens // 2, num_tokens - 1):
            found, error = token_row(model, shared, own, places, layer=number, token=token)
            difference = np.abs(found - exact_row(layer, token)).max()
            assert difference <= error + 1e-6
            assert error < 0.02


def test_what_the_classifier_reads_is_there_for_every_head():
    seen = look(make(share="headwise", projection="linear"))
    plan = plan_rows(seen, num_images=1, budget=LARGE, other=0)
    model, shared, own, places = packed(seen, plan)
    for number, maps in enumerate(seen.map("attention")):
        weights, _ = own.rows(places[number]["start"])
        F, _ = shared.projection(model["projections"][model["layers"][number]["values"]])
        found = np.einsum(
            "hk,hkn->hn", weights[:, model["layers"][number]["prefix"] :], np.broadcast_to(F, (3, *F.shape[1:]))
        )
        np.testing.assert_allclose(found, maps.flatten(1), atol=0.01)


def test_heads_go_first_then_ordinary_layers_then_images():
    seen = look(make(share="kv", projection="avgpool", k=[6, None, 6]))
    everything = plan_rows(seen, num_images=10, budget=LARGE, other=0)
    assert (everything.num_images, everything.each_head, everything.ordinary) == (10, True, True)
    budgets = np.linspace(everything.complete, 2000, 50).astype(int)
    plans = [plan_rows(seen, num_images=10, budget=int(budget), other=0) for budget in budgets]
    assert all(plan.complete == everything.complete for plan in plans)
    found = list(dict.fromkeys((plan.num_images, plan.each_head, plan.ordinary) for plan in plans))
    assert found[:3] == [(10, True, True), (10, False, True), (10, False, False)]
    fewer = [num_images for num_images, each_head, _ in found[3:] if not each_head]
    assert fewer
    assert all(num_images < 10 for num_images in fewer)


def test_the_size_of_rows_is_foreseen():
    for kwargs in (dict(share="kv"), dict(share="headwise", k=12)):
        seen = look(make(projection="linear", **kwargs))
        plan = plan_rows(seen, num_images=1, budget=LARGE, other=0)
        shared, own = Pack(), Pack()
        pack_projections(shared, seen)
        pack_attention(own, seen, plan, with_rows=True)
        assert len(shared.text()) + len(own.text()) == pytest.approx(plan.complete, rel=0.2)


def test_projections_that_do_not_fit_leave_the_maps_of_the_classifier():
    seen = look(make(share="none", projection="linear"))
    plan = plan_rows(seen, num_images=1, budget=1000, other=0)
    assert not plan.has_projections
    model, _, own, places = packed(seen, plan)
    assert model["projections"] == []
    for number, maps in enumerate(seen.map("attention")):
        assert places[number]["tokens"] is None
        found, steps = own.rows(places[number]["start"])
        np.testing.assert_allclose(found[:, 1:], maps.flatten(1), atol=steps.max())


def test_ordinary_models_of_timm():
    model = timm.create_model("vit_tiny_patch16_224", img_size=(28, 20), patch_size=4, depth=2, num_classes=3).eval()
    seen = look(model)
    model, shared, own, places = packed(seen, plan_rows(seen, num_images=1, budget=LARGE, other=0))
    for number, layer in enumerate(seen.layers):
        found, error = token_row(model, shared, own, places, layer=number, token=20)
        assert np.abs(found - exact_row(layer, 20)).max() <= error + 1e-6


def test_quantised_rows_are_within_half_a_step():
    draw = np.random.default_rng(0)
    for rows in (draw.random((3, 40)), draw.normal(size=(2, 3, 40)), np.zeros((2, 4))):
        values, steps = quantise(rows.astype(np.float32))
        assert values.dtype == (np.int8 if (rows < 0).any() else np.uint8)
        assert (np.abs(values * steps[..., None] - rows) <= steps[..., None] * 0.5001).all()
