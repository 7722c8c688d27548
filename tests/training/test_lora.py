"""Low-rank adapters: the adapted model trains, resumes and is saved merged, as a model without adapters."""

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny_runs import SETTINGS, assert_same_runs, make_images, train

from linvit.model.build import TimmModel
from linvit.runs.folder import load_classifier
from linvit.runs.lora import merge_adapters
from linvit.training.lora import add_adapters, check_adapters
from linvit.training.lora_options import LoraOptions
from linvit.training.model import place_model
from linvit.training.optim import create_optimizer
from linvit.training.options import DeviceOptions, OptimizerOptions

pytest.importorskip("peft")

# The class token does not see the last convolution.
POOLED = {"class_token": False, "global_pool": "avg"}
NEW = ("head.", "_projection.", ".local.", "lora_")


def make(name: str = SETTINGS["model"], **settings: Any) -> TimmModel:
    torch.manual_seed(0)
    sizes = {**SETTINGS["model_kwargs"], "img_size": 32, "num_classes": 3}
    model: TimmModel = timm.create_model(name, **{**sizes, **settings})
    return model


def adapted(model: TimmModel, rank: int = 2, **settings: Any) -> TimmModel:
    """The model with adapters that have been trained: B is no longer zero."""
    add_adapters(model, LoraOptions(lora=rank, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model


MODELS: dict[str, dict[str, Any]] = {
    "kv": {"k": 4},
    "none": {"k": [[4, 2], [3, 4]], "share": "none", "projection": "linear"},
    "layerwise": {"k": 4, "share": "layerwise"},
    "local": {"k": [4, None], "local": 3, "reg_tokens": 2, "init_values": 0.1, **POOLED},
    "rotary": {"name": "linvit_tiny_patch16_rope_224", "k": 4},
    "rotary, ordinary layers": {"name": "linvit_tiny_patch16_rope_224", "projection": "identity"},
    "ordinary": {"name": "vit_tiny_patch16_224"},
}


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_merged_weights_compute_the_same(settings: dict[str, Any]) -> None:
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    plain = make(**settings).double().eval()
    before = plain.forward_features(x)
    model = adapted(make(**settings)).double().eval()
    features = model.forward_features(x)
    assert (features - before).abs().max() > 0.01
    plain.load_state_dict(merge_adapters(model.state_dict(), path=Path("run")))
    torch.testing.assert_close(plain.forward_features(x), features, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("checkpointing", [False, "full", "mlp"])
def test_gradients_reach_what_is_new_and_nothing_else(settings: dict[str, Any], checkpointing: Any) -> None:
    if checkpointing == "mlp" and "name" in settings:
        checkpointing = "full"
    model = adapted(make(**settings)).train()
    expected = gradients(model)
    assert {name for name, gradient in expected.items() if gradient is not None} == {
        name for name in expected if any(part in name for part in NEW)
    }
    assert all(bool(gradient.any()) for gradient in expected.values() if gradient is not None)
    place_model(model, DeviceOptions(grad_checkpointing=checkpointing), ranks())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def gradients(model: TimmModel) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model(x).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def ranks() -> Any:
    from linvit.distributed import Ranks

    return Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def test_it_starts_as_the_given_model() -> None:
    x = torch.randn(2, 3, 32, 32)
    plain, model = make(k=4).eval(), make(k=4).eval()
    assert add_adapters(model, LoraOptions(lora=2)) == [
        "--lora 2: adapters beside blocks.0-1.attn.proj, blocks.0-1.attn.qkv, blocks.0-1.mlp.fc1, blocks.0-1.mlp.fc2"
    ]
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-5)


def test_adapters_train_at_the_rate_of_their_layer_and_new_parameters_at_the_heads() -> None:
    model = adapted(make(k=4, local=3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = create_optimizer(model, OptimizerOptions(layer_decay=0.5), lr=1e-3)
    scales = {names[id(each)]: group["lr_scale"] for group in optimizer.param_groups for each in group["params"]}
    assert set(scales) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, scale in scales.items():
        depth = 3 if "lora_" not in name else 1 + int(name.split(".")[1])
        assert scale == pytest.approx(0.5 ** (3 - depth)), name


SHAPE = {"model_kwargs": {**SETTINGS["model_kwargs"], **POOLED}, "local": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), val=2)


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("base")
    assert train(data, output, "base", epochs=1, **SHAPE) == 0
    return output / "base"


def adapt(data: Path, base: Path, output: Path, experiment: str = "run", **settings: Any) -> int:
    given = {"pretrained_path": str(base), **SHAPE, "lora": 2, "model_ema": True, "model_ema_decay": 0.5}
    return train(data, output, experiment, **{**given, **settings})


def test_a_run_is_saved_merged_and_resumes_exactly(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(data, base, tmp_path, "whole") == 0
    assert "--lora 2: adapters beside blocks.0-1.attn.proj" in capsys.readouterr().out
    assert adapt(data, base, tmp_path, "halves", stop_epoch=1) == 0
    assert adapt(data, base, tmp_path, "halves", resume="auto") == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "halves")

    # From here on nothing needs PEFT.
    monkeypatch.setitem(sys.modules, "peft", None)
    before = load_file(base / "best/model.safetensors")
    after = load_file(tmp_path / "whole/last/model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
    assert changed == {
        name
        for name in before
        if (name.startswith("blocks.") and name.endswith(layers)) or any(part in name for part in NEW)
    }
    # A checkpoint keeps the adapters apart, and is read merged.
    (*_, state) = sorted((tmp_path / "whole/checkpoints").iterdir())
    assert any("lora_A" in name for name in load_file(state / "model.safetensors"))
    x = torch.randn(2, 3, 32, 32)
    last = load_classifier(str(tmp_path / "whole"), weights="last").model(x)
    torch.testing.assert_close(load_classifier(str(state)).model(x), last, rtol=0, atol=0)
    averaged = load_classifier(str(state), use_ema=True).model(x)
    assert not torch.equal(averaged, last)


def test_a_resumed_run_keeps_its_adapters(data: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    assert adapt(data, base, tmp_path, epochs=1) == 0
    assert adapt(data, base, tmp_path, epochs=2, resume="auto", lora=3) == 1
    assert "--resume: lora was 2 and is now 3" in capsys.readouterr().err
    assert adapt(data, base, tmp_path, epochs=2, resume="auto", dry_run=True) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze": ["backbone"]}, "freeze backbone would freeze the adapters of lora: remove one of them"),
        ({"fsdp": True}, "fsdp does not support lora"),
        ({"pretrained_path": None}, "lora adapts given weights: set pretrained_path"),
        ({"lora": None, "lora_targets": ["qkv"]}, "lora_targets does nothing without lora"),
        ({"lora_targets": ["qvk"]}, "--lora-targets: unknown linear layer 'qvk'; did you mean 'qkv'?"),
        (
            {"projection": "maxpool"},
            "projection 'maxpool' reduces tokens before Wk and Wv, so qkv cannot have adapters",
        ),
        (
            {"model": "resnet10t", "model_kwargs": {}, "k": None, "local": None},
            "resnet10t has no linear layers besides its classifier",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    settings: dict[str, Any], words: str, data: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(data, base, tmp_path, **settings) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_without_the_package_it_is_refused(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("linvit.training.lora.importlib.util.find_spec", lambda name: None)
    assert adapt(data, base, tmp_path) == 2
    assert capsys.readouterr().err == (
        "error: --lora needs the package peft: pip install 'linvit[lora]', or remove the flag\n"
    )


@pytest.mark.parametrize("projection", ["maxpool", "conv"])
def test_projections_before_the_keys_leave_the_other_layers(projection: str) -> None:
    model = make(k=4, projection=projection)
    with pytest.raises(ValueError, match="set --lora-targets proj fc1 fc2"):
        check_adapters(model, LoraOptions(lora=2))
    model = adapted(model, lora_targets=("proj", "fc1", "blocks.1.mlp.fc2"))
    x = torch.randn(2, 3, 32, 32)
    plain = make(k=4, projection=projection).eval()
    outputs = model.eval()(x)
    plain.load_state_dict(merge_adapters(model.state_dict(), path=Path("run")))
    torch.testing.assert_close(plain(x), outputs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_layers_that_are_read_and_not_called_are_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"reads the weights of blocks\.0-1\.attn\.qkv .*set --lora-targets fc1 fc2 proj$"
    ):
        adapted(make(name))
    adapted(make(name), lora_targets=("proj", "fc1", "fc2"))


def test_damaged_adapters_are_refused() -> None:
    state = adapted(make(k=4)).state_dict()
    del state["blocks.1.attn.qkv.lora_A.default.weight"]
    with pytest.raises(ValueError, match=r"^file: the adapters of blocks\.1\.attn\.qkv are missing or do not fit it$"):
        merge_adapters(state, path=Path("file"))
