"""Resuming an interrupted conversion, and starting from an earlier one."""

import math
from pathlib import Path

import pytest
import torch
from timm.models import save_for_hf
from vits import make_activations, make_images, make_vit

from linvit.conversion.convert import convert_vit, projected_lengths
from linvit.conversion.fit import FitOptions, LayerFit, fit_layers
from linvit.conversion.solvers import DescentOptions
from linvit.conversion.state import FitState, load_converted


def test_a_saved_conversion_loads_at_the_originals_size(tmp_path: Path) -> None:
    converted = convert_vit(make_vit(), k=[9, None, 16])
    save_for_hf(converted, tmp_path)
    same, larger = (load_converted(tmp_path, make_vit(img_size=size)).model for size in (64, 96))
    images = make_images(2)
    torch.testing.assert_close(same(images), converted(images))
    assert projected_lengths(larger) == [9, None, 16]
    assert larger.patch_embed.img_size == (96, 96)
    assert torch.equal(larger.blocks[2].attn.proj.weight, converted.blocks[2].attn.proj.weight)


def test_a_folder_that_does_not_fit_the_original_is_refused(tmp_path: Path) -> None:
    save_for_hf(convert_vit(make_vit(), k=9), tmp_path / "converted")
    with pytest.raises(ValueError, match=r"converted belongs to another model: its .* differ"):
        load_converted(tmp_path / "converted", make_vit(depth=2))
    with pytest.raises(ValueError, match="k=9 does not shorten a sequence of 9 patches"):
        load_converted(tmp_path / "converted", make_vit(img_size=24))
    save_for_hf(make_vit(), tmp_path / "plain")
    with pytest.raises(ValueError, match="plain is not a converted model: give the output folder of a conversion"):
        load_converted(tmp_path / "plain", make_vit())


@pytest.mark.parametrize("text", ["", "null", "[[1]]"])
@pytest.mark.parametrize("name", ["settings.json", "plan.json", "layer-000.json", "layer-000.safetensors"])
def test_damaged_progress_is_one_sentence(name: str, text: str, tmp_path: Path) -> None:
    converted = convert_vit(make_vit(depth=1), k=9)

    def resume() -> list[LayerFit]:
        state = FitState(tmp_path / "out", {"k": 9})
        assert state.plan(lambda: [9]) == [9]
        return state.load(converted)

    fit = LayerFit(0, 9, 0.1, 0.1, 0.1, 0.1)
    FitState(tmp_path / "out", {"k": 9}).save(fit, converted)
    assert resume() == [fit]
    (tmp_path / ".out.convert" / name).write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"\.out\.convert is damaged \(.+\): delete it to start over"):
        resume()


class Stop(Exception):
    pass


@pytest.mark.parametrize("share", ["kv", "layerwise"])
def test_a_stopped_fit_resumes(share, tmp_path):
    options = FitOptions(DescentOptions(steps=5, images=4, queries=8), max_error=0.08)
    model = make_vit()
    torch.manual_seed(0)
    uninterrupted = convert_vit(model, k=9, share=share)
    expected = fit_layers(model, uninterrupted, make_activations(model), options)
    assert [each.k for each in expected] == [None, 9, 9]

    def run(stop_after):
        state = FitState(tmp_path / "out", {"k": 9, "sizes": (64, 64)})
        converted = convert_vit(model, k=9, share=share)
        done = state.load(converted)

        def report(each):
            state.save(each, converted)
            if each.layer == stop_after:
                raise Stop

        fits = fit_layers(model, converted, make_activations(model), options, done=done, report=report)
        return len(done), converted, fits

    for layer in (0, 1):
        with pytest.raises(Stop):
            run(layer)
    num_done, converted, fits = run(None)
    assert num_done == 2
    assert fits == expected
    state = converted.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in uninterrupted.state_dict().items())
    words = r"out was started with different settings \(k\): repeat .*, or delete .*\.out\.convert to start over"
    with pytest.raises(ValueError, match=words):
        FitState(tmp_path / "out", {"k": 16, "sizes": (64, 64)})
    FitState(tmp_path / "out", {"k": 9, "sizes": (64, 64)}).remove()
    assert list(tmp_path.iterdir()) == []


def test_settings_may_change_while_nothing_is_fitted(tmp_path):
    assert FitState(tmp_path / "out", {"k": 9}).plan(lambda: [9, None]) == [9, None]
    assert FitState(tmp_path / "out", {"k": 9}).plan(lambda: [16]) == [9, None]
    assert FitState(tmp_path / "out", {"k": 16}).plan(lambda: [16]) == [16]


def test_a_plan_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise ValueError("too few patches")

    with pytest.raises(ValueError, match="too few"):
        FitState(tmp_path / "out", {}).plan(fail)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_finite_is_read_back(tmp_path):
    converted = convert_vit(make_vit(), k=[None, 9, 9])
    state = FitState(tmp_path / "out", {})
    state.save(LayerFit(0, None, 0.5, math.nan, 0.25, 1.0), converted)
    (fit,) = state.load(converted)
    assert math.isnan(fit.error_after)
    assert (fit.layer, fit.k, fit.error_before, fit.block_error, fit.cosine) == (0, None, 0.5, 0.25, 1.0)
