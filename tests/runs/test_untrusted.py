"""What a file says about its model can neither start a download, run code nor write a file."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from tiny_runs import SETTINGS, make_images, train

import linvit.model.build
import train_imagenet
from linvit.cli import main
from linvit.data.augment.build import InputSpec, resolve_input
from linvit.data.options import InputOptions
from linvit.model.build import build, create_model, parse_spec
from linvit.model.description import check_arguments
from linvit.prediction.predictor import Predictor
from linvit.runs.checkpoint import read_checkpoint, write_checkpoint
from linvit.runs.folder import load_classifier, save_classifier
from linvit.settings.flags import UsageError
from linvit.training.config import TrainConfig, parse
from linvit.training.model import build_model

NAME = "vit_tiny_patch16_224"
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": [16, 16], "num_classes": 3}
URL = "http://127.0.0.1:9/weights.pth"
CLASSES = ["blue", "green", "red"]
SPEC = InputSpec((16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
ELSEWHERE = {"url": URL, "hf_hub_id": "a/b", "file": "/etc/hostname", "source": "hf-hub", "custom_load": "hf"}
# Each of these would make timm fetch, read or write something, or returns something other than the model.
PLANTED: dict[str, Any] = {
    "pretrained": True,
    "pretrained_cfg": {"url": URL, "num_classes": 3},
    "pretrained_cfg_overlay": {"hf_hub_id": "a/b"},
    "pretrained_filter_fn": "os.system",
    "pretrained_model_args": {"img_size": 16},
    "pretrained_strict": False,
    "checkpoint_path": "/etc/hostname",
    "cache_dir": "cache",
    "features_only": True,
    "pruned": True,
    "kwargs_filter": ["num_classes"],
    "model_cfg": {"url": URL},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach the network fails the test, also one that is caught."""

    def fail(*arguments: Any, **options: Any) -> Any:
        pytest.fail(f"reached the network: {arguments}")

    for target in ("torch.hub.download_url_to_file", "timm.models._hub.download_url_to_file"):
        monkeypatch.setattr(target, fail)
    for name in ("load_state_dict_from_url", "download_cached_file", "load_state_dict_from_hf", "load_custom_from_hf"):
        monkeypatch.setattr(f"timm.models._builder.{name}", fail)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", fail)
    monkeypatch.setattr(linvit.model.build, "download_from_hf", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), train=2, val=1)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory and cache, which must still be empty after the test."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def tiny() -> Any:
    return timm.create_model(NAME, **TINY)


def plant_file(path: Path, planted: dict[str, Any], arch: str = NAME) -> Path:
    """A training checkpoint as linvit writes it, with further model arguments."""
    state = {
        "arch": arch,
        "model_args": TINY | planted,
        "img_size": (16, 16),
        "class_names": CLASSES,
        "settings": {},
        "state_dict": tiny().state_dict(),
    }
    if path.suffix:
        torch.save(state, path)
        return path
    return write_checkpoint(path.parent, {**state, "state_dict_ema": None, "progress": {"epoch": 0, "batch": 0}})


def plant_folder(path: Path, planted: dict[str, Any], pretrained_cfg: dict[str, Any] | None = None) -> Path:
    """A local-dir folder with further entries in config.json."""
    save_classifier(path, tiny(), class_names=CLASSES, spec=SPEC, about={})
    config = json.loads((path / "config.json").read_text())
    config["model_args"] |= planted
    config["pretrained_cfg"] |= pretrained_cfg or {}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("kind", ["file.pth", "state", "folder"])
def test_planted_arguments_are_refused(kind: str, name: str, tmp_path: Path, elsewhere: Path) -> None:
    planted = {name: PLANTED[name]}
    source = plant_folder(tmp_path / kind, planted) if kind == "folder" else plant_file(tmp_path / kind, planted)
    with pytest.raises(ValueError, match=rf"{kind}.*: {NAME} does not take these arguments: unknown keyword '{name}'"):
        load_classifier(str(source))


@pytest.mark.parametrize(
    "size", [{"depth": 10**6}, {"embed_dim": 20_000}, {"reg_tokens": 10**9}, {"img_size": [10**6, 10**6]}], ids=str
)
def test_a_model_far_larger_than_its_weights_is_not_built(size: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file\.pth describes a far larger model than its weights are of"):
        load_classifier(str(plant_file(tmp_path / "file.pth", size)))


def test_the_users_own_arguments_may_make_a_described_model_smaller(tmp_path: Path) -> None:
    path = plant_file(tmp_path / "file.pth", {"depth": 10**6})
    assert len(load_classifier(str(path), model_kwargs={"depth": 1}).model.blocks) == 1


@pytest.mark.parametrize("arch", ["hf-hub:a/b", "hf_hub:a/b", "local-dir:/tmp", "https://a/b", "../model", "", "a.b"])
def test_an_architecture_is_a_registered_name(arch: str, tmp_path: Path, elsewhere: Path) -> None:
    path = plant_file(tmp_path / "file.pth", {}, arch)
    with pytest.raises(ValueError, match=r"file\.pth: unknown model"):
        load_classifier(str(path))


def test_addresses_in_a_config_are_ignored(tmp_path: Path, images: Path, elsewhere: Path) -> None:
    folder = plant_folder(tmp_path / "folder", {}, ELSEWHERE)
    classifier = load_classifier(str(folder))
    assert classifier.class_names == CLASSES
    assert not {"url", "hf_hub_id", "file", "source"} & classifier.model.pretrained_cfg.keys()
    assert not classifier.model.pretrained_cfg["custom_load"]
    assert create_model(f"local-dir:{folder}").pretrained_cfg.get("url") is None
    settings = {"model": f"local-dir:{folder}", "pretrained": True, "data_dir": str(images), "lr": 0.1}
    model, new = build_model(TrainConfig(**settings), class_names=CLASSES)
    assert new == []
    assert torch.equal(model.head.weight, classifier.model.head.weight)


COMMANDS = {
    "eval": "eval SOURCE DATA -j 0",
    "predict": "predict SOURCE DATA/val/red --workers 0",
    "average": "average SOURCE SOURCE -o OUT/average",
    "convert": f"convert {NAME} --weights SOURCE --images DATA -o OUT/converted --device cpu",
    "spectrum": f"spectrum {NAME} --weights SOURCE --images DATA --num-images 1 --device cpu",
    "teacher": "train DATA --kd-model-name SOURCE --model linvit_mini_patch4_64 --img-size 32 --device cpu "
    "--output OUT -j 0 -b 2 --lr 0.1",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["file.pth", "folder"])
def test_every_command_refuses_them(
    kind: str, command: str, tmp_path: Path, images: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = {"pretrained_cfg": {"url": URL}, "cache_dir": "cache", "pretrained": True}
    source = plant_folder(tmp_path / kind, planted) if kind == "folder" else plant_file(tmp_path / kind, planted)
    places = {"SOURCE": str(source), "DATA": str(images), "OUT": str(tmp_path)}
    argv = COMMANDS[command]
    for word, place in places.items():
        argv = argv.replace(word, place)
    assert main(argv.split()) == 1
    assert f"{NAME} does not take these arguments" in capsys.readouterr().err


def test_weights_alone_are_taken_from_a_planted_file(tmp_path: Path, images: Path, elsewhere: Path) -> None:
    planted = {"pretrained_cfg": {"url": URL}, "pretrained": True}
    arguments = {name: value for name, value in TINY.items() if name not in ("num_classes", "img_size")}
    settings = {"model": NAME, "model_kwargs": arguments, "img_size": (16, 16), "data_dir": str(images)}
    for source in (plant_file(tmp_path / "file.pth", planted), plant_folder(tmp_path / "folder", planted)):
        for option in ("pretrained_path", "initial_checkpoint"):
            model, _ = build_model(TrainConfig(**settings, **{option: source}), class_names=CLASSES)
            assert model.num_classes == 3


def test_a_planted_state_is_resumed_from_without_its_arguments(tmp_path: Path, images: Path) -> None:
    assert train(images, tmp_path, epochs=1, batch_size=4) == 0
    (old,) = (tmp_path / "run/checkpoints").glob("state-0001-*")
    state = read_checkpoint(old)
    state["model_args"] |= {"pretrained_cfg": {"url": URL}, "pretrained": True}
    (tmp_path / "planted").mkdir()
    planted = write_checkpoint(tmp_path / "planted", state)
    assert train(images, tmp_path, "resumed", epochs=2, batch_size=4, resume=str(planted)) == 0


def test_a_configuration_cannot_reach_the_network(
    tmp_path: Path, images: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for planted, words in (
        ({"model_kwargs": {"pretrained_cfg": {"url": URL}}}, "unknown keyword 'pretrained_cfg'"),
        ({"model_kwargs": {"cache_dir": "cache"}}, "unknown keyword 'cache_dir'"),
        ({"model": "hf-hub:a/b"}, "give --model hf-hub:a/b on the command line"),
        ({"model_kwargs": {"pretrained": True}}, "takes arguments of the model's class, not 'pretrained'"),
        ({"model_kwargs": {"num_classes": 5}}, "takes no num_classes, which the data determine"),
        ({"kd_model_name": "HF_Hub:a/b"}, "give --kd-model-name HF_Hub:a/b on the command line"),
    ):
        file = tmp_path / "args.yaml"
        file.write_text(yaml.safe_dump(SETTINGS | {"output": str(tmp_path / "out")} | planted))
        assert train_imagenet.main([str(images), "--config", str(file)]) in (1, 2)
        assert words in capsys.readouterr().err
    assert parse(["data", "--config", str(file), "--kd-model-name", "hf-hub:a/b"]).kd_model_name == "hf-hub:a/b"
    file.write_text(yaml.safe_dump({"data_dir": "hf:a/b"}))
    assert train_imagenet.main(["--config", str(file)]) == 2
    assert "give --data-dir hf:a/b on the command line" in capsys.readouterr().err
    file.write_text(yaml.safe_dump({"data_dir": f"hf:{images}"}))
    assert str(parse(["--config", str(file)]).data_dir) == f"hf:{images}"
    for place in ("eval", "predict"):
        for planted in ("pretrained=true", "model=x"):
            assert main([place, NAME, str(images), "--model-kwargs", planted]) == 2
            assert "--model-kwargs takes arguments of the model's class" in capsys.readouterr().err
    for place in ("eval", "predict"):
        assert main([place, NAME, str(images), "--model-kwargs", f"pretrained_cfg={URL}"]) == 1
        assert "unknown keyword 'pretrained_cfg'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="unknown keyword 'cache_dir'"):
        build(parse_spec(f"{NAME}:cache_dir=cache"), (32, 32))


def test_a_model_on_the_hub_is_described_by_plain_data_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_folder(tmp_path / "a", {}, ELSEWHERE)
    plant_folder(tmp_path / "b", {"cache_dir": "cache"})
    monkeypatch.setattr(linvit.model.build, "download_from_hf", lambda name, file: tmp_path / name[-1] / file)
    cfg = create_model("hf-hub:x/a").pretrained_cfg
    assert (cfg["source"], cfg["hf_hub_id"], cfg["custom_load"]) == ("hf-hub", "x/a", False)
    assert not {"url", "file", "hf_hub_filename"} & cfg.keys()
    with pytest.raises(ValueError, match="unknown keyword 'cache_dir'"):
        create_model("hf-hub:x/b")


def test_a_run_in_which_everything_is_planted_predicts(tmp_path: Path, images: Path, elsewhere: Path) -> None:
    """A run's args.yaml is read for preprocessing; its model arguments are not used."""
    run = tmp_path / "run"
    run.mkdir()
    plant_folder(run / "best", {}, ELSEWHERE)
    planted = {"model": "hf-hub:a/b", "pretrained": True, "model_kwargs": {"pretrained_cfg": {"url": URL}}}
    (run / "args.yaml").write_text(yaml.safe_dump(planted))
    predictions = list(Predictor(str(run), device="cpu")(str(images / "val/red")))
    assert len(predictions[0].labels) == 3


def test_arguments_of_a_model_are_its_constructors(tmp_path: Path) -> None:
    check_arguments(NAME, {"img_size": (32, 32), "qkv_bias": False, "norm_layer": "layernorm", "init_values": 1e-5})
    check_arguments("linvit_mini_patch4_64", {"k": [4, None, [1, 2]], "projection": "linear", "qk_norm": True})
    check_arguments("tf_efficientnet_b0", {"bn_eps": 1e-3, "bn_momentum": 0.1})
    check_arguments("resnet18.a1_in1k", {"num_classes": 3, "block_args": {"x": 1}, "drop_path_rate": 0.1})
    for name in timm.list_models("*_base*"):
        check_arguments(name, {"num_classes": 3, "in_chans": 3, "global_pool": "avg"})
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    for value in (torch.zeros(2), print, Path("x"), {1: 2, "a": object()}, deep, float("nan")):
        with pytest.raises(ValueError, match="the model argument depth takes finite numbers, text, or lists of these"):
            check_arguments(NAME, {"depth": value})


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"mean": [0.5]}, "the model's mean is not for red, green and blue: set --mean"),
        ({"std": [0.5, 0.0, 0.5]}, "std.1: input should be greater than 0"),
        ({"crop_pct": 0}, "crop_pct: input should be greater than 0"),
        ({"crop_pct": 100}, "crop_pct: input should be less than or equal to 2"),
    ],
)
def test_preprocessing_that_images_cannot_have_is_refused(tmp_path: Path, planted: dict[str, Any], words: str) -> None:
    plant_folder(tmp_path / "model", {}, planted)
    with pytest.raises(ValueError, match=words):
        resolve_input(load_classifier(str(tmp_path / "model")).model, InputOptions.model_validate({}))


def test_weights_keep_the_preprocessing_that_they_were_saved_with(tmp_path: Path) -> None:
    """A run that is resumed with another mean has best weights of the mean before."""
    plant_folder(tmp_path / "best", {}, {})
    (tmp_path / "args.yaml").write_text("{mean: [0.1, 0.1, 0.1], crop_pct: 0.5, amp: true}")
    settings = load_classifier(str(tmp_path)).settings
    assert (tuple(settings["mean"]), settings["crop_pct"], settings["amp"]) == ((0.5, 0.5, 0.5), 1.0, True)


def test_a_failed_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> str:
        raise OSError("An error happened. Please check your connection.\nMore lines")

    monkeypatch.setattr(linvit.model.build, "download_from_hf", fail)
    with pytest.raises(ValueError, match=r"^hf-hub:a/b cannot be downloaded \(OSError\): check the name"):
        create_model("hf-hub:a/b")
