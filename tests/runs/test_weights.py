"""Weights from folders and files, fitted to models of other sizes and classes."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import linvit  # noqa: F401  registers the models
from linvit.runs.weights import compact, fit_weights, load_exactly, read_weights

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def vit(img_size: Any = 32, num_classes: int = 5, **arguments: Any) -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=img_size, num_classes=num_classes, **SMALL, **arguments)


def linformer(img_size: Any = 32, num_classes: int = 5, **arguments: Any) -> Any:
    return timm.create_model(
        "linvit_tiny_patch16_224", img_size=img_size, num_classes=num_classes, **SMALL, **{"k": 4, **arguments}
    )


def saved_file(model: nn.Module, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def test_vit_weights_cover_all_of_a_linformer_but_its_projections(tmp_path: Path) -> None:
    source = vit()
    model = linformer(projection="linear", share="headwise")
    new = fit_weights(model, read_weights(saved_file(source, tmp_path / "vit.safetensors")))
    assert new == sorted(name for name in model.state_dict() if "projection" in name)
    assert len(new) == 6
    for name, weight in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_another_size_and_class_count_are_adapted(tmp_path: Path) -> None:
    source, model = vit(img_size=(32, 48)), vit(img_size=64, num_classes=7)
    timm.models.save_for_hf(source, tmp_path / "vit", safe_serialization=True)
    new = fit_weights(model, read_weights(tmp_path / "vit"))
    assert new == ["head.bias", "head.weight"]
    # timm loads the same folder, whose config.json has the size of the source's non-square grid.
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True, img_size=64, num_classes=7)
    for name, weight in by_timm.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(model.state_dict()[name], weight), name


def test_a_linformer_is_resized_as_by_set_input_size(tmp_path: Path) -> None:
    source, model = linformer(), linformer(img_size=64)
    timm.models.save_for_hf(source, tmp_path / "source", safe_serialization=True)
    assert fit_weights(model, read_weights(tmp_path / "source")) == []
    source.set_input_size((64, 64))
    for name, weight in source.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight)


def test_a_classifier_of_other_classes_is_new_even_if_it_would_fit(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    timm.models.save_for_hf(vit(), tmp_path / "vit", safe_serialization=True, model_config={"label_names": names})
    saved = read_weights(tmp_path / "vit")
    assert fit_weights(vit(), saved, class_names=names) == []
    assert fit_weights(vit(), saved, class_names=["v", "w", "x", "y", "z"]) == ["head.bias", "head.weight"]
    assert fit_weights(vit(), saved, class_names=names[::-1]) == ["head.bias", "head.weight"]


def test_other_mismatches_are_named(tmp_path: Path) -> None:
    path = saved_file(vit(), tmp_path / "vit.safetensors")
    deeper = timm.create_model("vit_tiny_patch16_224", img_size=32, **{**SMALL, "depth": 4}, num_classes=5)
    with pytest.raises(
        ValueError, match=r"vit.safetensors does not fit vit_tiny_patch16_224: it lacks blocks\.3\.attn"
    ):
        fit_weights(deeper, read_weights(path))
    shallower = timm.create_model("vit_tiny_patch16_224", img_size=32, **{**SMALL, "depth": 2}, num_classes=5)
    with pytest.raises(ValueError, match=r"it has unexpected parameters blocks\.2\.attn"):
        fit_weights(shallower, read_weights(path))
    wider = timm.create_model("vit_tiny_patch16_224", img_size=32, **{**SMALL, "embed_dim": 64}, num_classes=5)
    with pytest.raises(
        ValueError, match=r"the shape of blocks\.0\.attn\.proj\.bias is 32, not 64; .*; \d+ more shapes differ"
    ):
        fit_weights(wider, read_weights(path))


def test_a_linformers_own_projections_must_fit(tmp_path: Path) -> None:
    path = saved_file(linformer(projection="linear"), tmp_path / "linear.safetensors")
    with pytest.raises(ValueError, match=r"has unexpected parameters blocks\.0-2\.attn\.key_projection\.weight"):
        fit_weights(linformer(projection="separable"), read_weights(path))


def test_load_exactly_adapts_nothing(tmp_path: Path) -> None:
    source = vit()
    saved = read_weights(saved_file(source, tmp_path / "vit.safetensors"))
    model = vit()
    load_exactly(model, saved.state_dict, path=saved.path)
    assert torch.equal(model.head.weight, source.head.weight)
    with pytest.raises(ValueError, match=r"the shape of pos_embed is 1×17×32, not 1×65×32"):
        load_exactly(vit(img_size=64), saved.state_dict, path=saved.path)


def test_training_checkpoints_of_timm_are_read(tmp_path: Path) -> None:
    raw, averaged = vit(), vit()
    checkpoint = {
        "epoch": 3,
        "state_dict": {f"module.{name}": value for name, value in raw.state_dict().items()},
        "state_dict_ema": averaged.state_dict(),
    }
    torch.save(checkpoint, tmp_path / "model.pth.tar")
    for use_ema, expected in ((True, averaged), (False, raw)):
        found = read_weights(tmp_path / "model.pth.tar", use_ema=use_ema)
        assert torch.equal(found.state_dict["head.weight"], expected.head.weight)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_broken_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match=rf"{name} cannot be read as weights"):
        read_weights(tmp_path / name)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.pth: there is no such file or folder"):
        read_weights(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match=r"is neither a run nor a folder with config.json"):
        read_weights(tmp_path)


def test_layer_numbers_are_merged() -> None:
    names = ["head.bias", *(f"blocks.{layer}.norm1.weight" for layer in (0, 1, 2, 5, 11)), "blocks.3.attn.proj.bias"]
    assert compact(names) == "blocks.3.attn.proj.bias, blocks.0-2,5,11.norm1.weight, head.bias"
    assert compact([]) == ""
