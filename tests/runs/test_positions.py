"""Prefix tokens and position embeddings of weights for other models: adapted exactly, or refused with what to set."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from linvit.runs.folder import load_classifier
from linvit.runs.weights import fit_weights, read_weights

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
WIDE = (16, 64)


def vit(img_size: Any = 32, name: str = "vit_tiny_patch16_224", **arguments: Any) -> Any:
    model = timm.create_model(name, img_size=img_size, **SMALL, **arguments).eval()
    # Fresh registers are nearly zero, and positions nearly equal.
    for parameter in (model.pos_embed, model.cls_token, model.reg_token):
        if parameter is not None:
            nn.init.normal_(parameter)
    return model


def linformer(img_size: Any = 32, **arguments: Any) -> Any:
    return vit(img_size, "linvit_tiny_patch16_224", k=4, **arguments)


def saved(model: nn.Module, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("make", [vit, linformer])
@pytest.mark.parametrize("img_size", [WIDE, WIDE[::-1]])
def test_weights_of_a_model_that_is_not_square_are_loaded_as_they_are(
    make: Any, img_size: tuple[int, int], tmp_path: Path
) -> None:
    """16×64 px have as many patches as 32×32."""
    source = make(img_size)
    model = make(img_size, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    fit_weights(model, read_weights(saved(source, tmp_path / "weights.safetensors")))
    images = torch.randn(2, 3, *img_size)
    assert torch.equal(model.eval()(images), source(images))


def test_ambiguous_weights_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(vit(WIDE), tmp_path / "weights.safetensors")
    cfg = {"pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}
    fit_weights(vit(WIDE, **cfg), read_weights(path))
    assumed = f"{path}: it does not record its image size; its 16 patches are taken as a"
    assert capsys.readouterr().err == f"{assumed} 2×8 grid\n"
    fit_weights(vit(64, **cfg), read_weights(path))
    assert capsys.readouterr().err == f"{assumed} 4×4 grid\n"
    # The usual case is clear.
    fit_weights(vit(32, **cfg), read_weights(path))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("projection", ["separable", "linear", "random"])
def test_projections_tell_the_grid(projection: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = linformer(WIDE, projection=projection)
    model = linformer((32, 64), projection=projection)
    fit_weights(model, read_weights(saved(source, tmp_path / "weights.safetensors")))
    assert capsys.readouterr().err == ""
    source.set_input_size((32, 64))
    images = torch.randn(2, 3, 32, 64)
    torch.testing.assert_close(model.eval()(images), source(images))


def test_a_recorded_size_is_used_and_a_grid_that_nothing_tells_is_refused(tmp_path: Path) -> None:
    source, model = vit((16, 48)), vit(64)
    timm.models.save_for_hf(source, tmp_path / "vit", safe_serialization=True)
    fit_weights(model, read_weights(tmp_path / "vit"))
    source.set_input_size((64, 64))
    assert torch.equal(model.pos_embed, source.pos_embed)
    path = saved(vit((16, 48)), tmp_path / "weights.safetensors")
    with pytest.raises(
        ValueError, match=r"does not record its image size, and its 12 patches are neither a square nor .* 8×8: choose"
    ):
        fit_weights(vit(64), read_weights(path))


@pytest.mark.parametrize("args", [{"input_size": [3, 16, 64], "img_size": None}, {"img_size": 32}, {"img_size": "x"}])
def test_the_arguments_in_a_checkpoint_of_timm_tell_its_size(args: dict[str, Any], tmp_path: Path) -> None:
    source = vit(WIDE if "input_size" in args else 32)
    checkpoint = {"arch": "vit_tiny_patch16_224", "args": Namespace(**args), "state_dict": source.state_dict()}
    torch.save(checkpoint, tmp_path / "model_best.pth.tar")
    model = vit(64)
    fit_weights(model, read_weights(tmp_path / "model_best.pth.tar"))
    source.set_input_size((64, 64))
    assert torch.equal(model.pos_embed, source.pos_embed)


@pytest.mark.parametrize(
    ("source", "model", "words"),
    [
        ({"reg_tokens": 4}, {}, "a class token and 4 register tokens, the model has a class token: set --model-kwargs "
         "reg_tokens=4$"),
        ({"reg_tokens": 4, "no_embed_class": True}, {}, "--model-kwargs reg_tokens=4 no_embed_class=true$"),
        ({}, {"reg_tokens": 2}, "--model-kwargs reg_tokens=0$"),
        ({"class_token": False, "global_pool": "avg"}, {}, "have no prefix tokens, the model has a class token: set "
         "--model-kwargs class_token=false global_pool=avg$"),
        ({}, {"class_token": False, "global_pool": "avg"}, "--model-kwargs class_token=true$"),
        ({"no_embed_class": True}, {}, "a class token, in the model these have other positions: set --model-kwargs "
         "no_embed_class=true$"),
        ({}, {"no_embed_class": True}, "--model-kwargs no_embed_class=false$"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("img_size", [32, 64])
def test_other_prefix_tokens_are_refused_with_what_to_set(
    source: dict[str, Any], model: dict[str, Any], words: str, img_size: int, tmp_path: Path
) -> None:
    path = saved(vit(**source), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=rf"weights\.safetensors does not fit linvit_tiny_patch16_224: .*{words}"):
        fit_weights(linformer(img_size, **model), read_weights(path))
    # What the sentence says helps.
    fit_weights(vit(img_size=img_size, **source), read_weights(path))


def distilled(**arguments: Any) -> Any:
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, **SMALL, **arguments).eval()
    for parameter in (model.pos_embed, model.cls_token, model.dist_token):
        nn.init.normal_(parameter)
    return model


def test_a_distillation_token_becomes_a_register(tmp_path: Path) -> None:
    source = distilled()
    path = saved(source, tmp_path / "deit.safetensors")
    with pytest.raises(
        ValueError,
        match="a class token and a distillation token, the model has a class token: choose a model with 'distilled' in "
        "its name, or set --model-kwargs reg_tokens=1 to keep the token as a register",
    ):
        fit_weights(vit(), read_weights(path), class_names=list("abcde"))
    model = vit(reg_tokens=1)
    assert fit_weights(model, read_weights(path), class_names=list("abcde")) == []
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval().forward_features(images), source.forward_features(images))
    # For evaluation the second classifier matters.
    with pytest.raises(ValueError, match=r"choose a model with 'distilled' in its name$"):
        fit_weights(vit(), read_weights(path))
    with pytest.raises(ValueError, match=r"it has unexpected parameters head_dist\.bias, head_dist\.weight"):
        fit_weights(vit(reg_tokens=1), read_weights(path))
    kwargs = {name: value for name, value in SMALL.items() if name != "num_classes"} | {"img_size": 32}
    loaded = load_classifier(str(path), model_name="deit_tiny_distilled_patch16_224", model_kwargs=kwargs)
    assert torch.equal(loaded.model(images), source(images))
    with pytest.raises(ValueError, match="choose a model without distillation token"):
        fit_weights(distilled(), read_weights(saved(vit(), tmp_path / "vit.safetensors")))


@pytest.mark.parametrize("name", ["cait_xxs24_224", "convit_tiny"])
def test_models_whose_prefix_tokens_never_have_positions_load_their_own_weights(name: str, tmp_path: Path) -> None:
    """Neither has the argument no_embed_class."""
    arguments = {"img_size": 64, "embed_dim": 48, "depth": 1, "num_heads": 4, "num_classes": 5}
    source, model = (timm.create_model(name, **arguments).eval() for _ in range(2))
    fit_weights(model, read_weights(saved(source, tmp_path / "weights.safetensors")))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), source(images))


def test_a_recorded_size_tells_the_grid_of_a_hybrid_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel of its patch embedding is 1×1, behind convolutions of stride 16."""
    name, small = "vit_tiny_r_s16_p8_224", {"embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5}
    source = timm.create_model(name, img_size=(64, 256), **small)
    timm.models.save_for_hf(source, tmp_path / "hybrid", safe_serialization=True)
    model = timm.create_model(name, img_size=(64, 128), **small)
    fit_weights(model, read_weights(tmp_path / "hybrid"))
    assert capsys.readouterr().err == ""
    source.set_input_size((64, 128))
    torch.testing.assert_close(model.pos_embed, source.pos_embed)
