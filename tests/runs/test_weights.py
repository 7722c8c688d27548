"""Weights from folders and files, fitted to models of other sizes and classes."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_runs import make_images
from torch import nn

from linvit.cli import main
from linvit.data.augment.build import InputSpec
from linvit.runs.folder import load_classifier, save_classifier
from linvit.runs.weights import WEIGHT_FILES, compact, fit_weights, load_exactly, read_weights

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


def test_the_only_state_dict_in_a_checkpoint_is_found_whatever_its_name(tmp_path: Path) -> None:
    weights = {"head.weight": torch.ones(2, 2)}
    optimizer = {"state": {0: {"step": torch.zeros(())}}, "param_groups": [{"lr": 0.1}]}
    for name in ("model_state_dict", "net", "params"):
        torch.save({"epoch": 3, name: weights, "optimizer_state_dict": optimizer}, tmp_path / "a.pth")
        assert read_weights(tmp_path / "a.pth").state_dict.keys() == weights.keys()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_broken_file_is_named(name: str, tmp_path: Path) -> None:
    for content in (b"not weights at all", b"hello", b"PK\3\4" + bytes(100), b""):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as weights: ") as caught:
            read_weights(tmp_path / name)
        assert ". " not in str(caught.value)


def test_an_exported_model_has_no_weights_to_read(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").touch()
    with pytest.raises(ValueError, match=r"m\.onnx is an exported model, .* give the run that it came from"):
        read_weights(tmp_path / "m.onnx")


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.pth: there is no such file or folder"):
        read_weights(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match=r"is neither a run nor a folder with config.json"):
        read_weights(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = linformer(img_size=32)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[3] = value
    folder, spec = tmp_path / "model", InputSpec((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    save_classifier(folder, model, class_names=list("abcde"), spec=spec, about={})
    image = make_images(tmp_path / "data", train=1, val=1) / "val/red/0.png"
    json_file, output = tmp_path / "eval.json", tmp_path / "out.csv"
    for argv in (
        ["eval", folder, tmp_path / "data", "--json", json_file, "-j", "0"],
        ["predict", folder, image, "-o", output, "--workers", "0"],
        ["average", folder, folder, "-o", tmp_path / "average"],
    ):
        assert main([str(part) for part in argv]) == 1
        error = capsys.readouterr().err
        assert f"{folder}/model.safetensors has weights that are NaN or infinite (blocks.1.mlp.fc1.bias)" in error
        assert error.count("\n") == 1
    assert not json_file.exists()
    assert not output.exists()


def test_files_that_hold_no_state_dict_are_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for value, words in (
        ([1, 2], "holds a list, not weights by name"),
        (torch.zeros(2), "holds a Tensor, not weights by name"),
        ({}, "holds no weights by name"),
        ({1: torch.zeros(2)}, "holds no weights by name"),
        ({"state_dict": [1]}, "holds no weights by name"),
        (
            {"epoch": 3, "a": {"w": torch.zeros(2)}, "b": {"w": torch.zeros(2)}},
            "holds no weights by name: its entry 'epoch' is of type int",
        ),
        ({"mask_token": torch.zeros(2)}, "holds no weights of a model"),
        ({"w": torch.eye(2).to_sparse()}, "holds no weights by name: its entry 'w' is not a dense tensor"),
        ({"w": torch.zeros(2, device="meta")}, "holds no weights by name: its entry 'w' is not a dense tensor"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "holds no weights by name: its entry 'w' is not a dense"),
        ({"w": torch.full((2,), math.nan).to(torch.float8_e4m3fn)}, "has weights that are NaN or infinite (w)"),
        ({"\x1b[1mw\n": 3}, "holds no weights by name: its entry '�[1mw�' is of type int"),
    ):
        torch.save(value, path)
        with pytest.raises(ValueError, match=re.escape(f"{path} {words}")):
            read_weights(path)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float64(1.0), r"numpy\.\S*scalar"),
        (Path("x"), r"pathlib\.\w+"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_a_refused_pickle_names_the_class_and_a_safe_way(
    value: Any, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = vit().state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save({"best": value, "state_dict": weights}, path)
    assert main(["eval", str(path), str(tmp_path), "--model", "vit_tiny_patch16_224"]) == 1
    error = capsys.readouterr().err
    assert re.match(rf"error: {path} holds objects of {name} and not only tensors; ", error)
    assert all(character.isprintable() for character in error.replace("\n", ""))
    _, *snippet = error.splitlines()
    assert len(snippet) == 2
    # The snippet does what it says.
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in snippet))
    assert read_weights(tmp_path / "weights.pth").state_dict.keys() == weights.keys()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("head.weight", torch.tensor(1.0)),
        ("pos_embed", torch.zeros(17, 32)),
        ("pos_embed", torch.zeros(1, 0, 32)),
        ("patch_embed.proj.weight", torch.zeros(32, 3, 0, 0)),
        ("patch_embed.proj.weight", torch.zeros(1)),
        ("reg_token", torch.tensor(1.0)),
        ("register_tokens", torch.zeros(1, 2, 32)),
        ("dist_token", torch.zeros(1)),
        ("cls_token", torch.zeros(3)),
    ],
)
def test_tensors_of_wrong_shapes_are_one_sentence(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({**vit().state_dict(), name: tensor}, path)
    kwargs = dict(SMALL)
    with pytest.raises(ValueError, match=rf"{path} does not fit vit_tiny_patch16_224: .+"):
        load_classifier(str(path), model_name="vit_tiny_patch16_224", model_kwargs=kwargs, img_size=(32, 32))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_truncated_folder_is_named(name: str, tmp_path: Path) -> None:
    timm.models.save_for_hf(vit(), tmp_path / "vit", safe_serialization=True)
    torch.save(vit().state_dict(), tmp_path / "vit/model.pth")
    for other in WEIGHT_FILES:
        if other != name:
            (tmp_path / "vit" / other).unlink(missing_ok=True)
    path = tmp_path / "vit" / name
    whole = path.read_bytes()
    for size in (0, 1, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"{path} cannot be read as weights: "):
            load_classifier(str(tmp_path / "vit"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": None}, "does not name its model: give --model NAME"),
        ({"architecture": ["vit"]}, "config.json does not describe a model (architecture: input should be a valid"),
        ({"model_args": [1]}, "config.json does not describe a model (model_args: input should be a valid dict"),
        ({"pretrained_cfg": [1]}, "config.json does not describe a model (pretrained_cfg: input should be a valid"),
        ({"label_names": 3}, "config.json does not describe a model (label_names: input should be a valid list"),
        ({"label_names": ["a", None]}, "config.json does not describe a model (label_names.1: input should be a"),
        ({"pretrained_cfg": {"mean": "x"}}, "config.json does not describe a model (mean: input should be a valid"),
        ({"pretrained_cfg": {"input_size": 3}}, "config.json does not describe a model ("),
        ({"model_args": {"img_size": "x"}}, "config.json"),
        ({"model_args": {"depth": "x"}}, "config.json"),
        ({"model_args": {"depth": -1}}, "config.json"),
        ({"model_args": {"num_heads": 0}}, "config.json"),
    ],
)
def test_wrong_fields_of_a_config_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    timm.models.save_for_hf(vit(), tmp_path / "vit", safe_serialization=True)
    file = tmp_path / "vit/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_classifier(str(tmp_path / "vit"))


def test_null_fields_of_a_config_are_as_if_absent(tmp_path: Path) -> None:
    timm.models.save_for_hf(vit(), tmp_path / "vit", safe_serialization=True)
    file = tmp_path / "vit/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"label_names": None, "global_pool": None, "num_features": None}))
    assert load_classifier(str(tmp_path / "vit")).class_names is None


def test_layer_numbers_are_merged() -> None:
    names = ["head.bias", *(f"blocks.{layer}.norm1.weight" for layer in (0, 1, 2, 5, 11)), "blocks.3.attn.proj.bias"]
    assert compact(names) == "blocks.3.attn.proj.bias, blocks.0-2,5,11.norm1.weight, head.bias"
    assert compact([]) == ""
