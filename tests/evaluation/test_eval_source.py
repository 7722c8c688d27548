"""`linvit eval` equals the evaluation during training, for every kind of source."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import SETTINGS, make_images, read_state, read_summary, train

import linvit.evaluation.source
import linvit.runs.folder
from linvit.cli import main
from linvit.data.augment.build import resolve_input
from linvit.data.loader import create_eval_loader
from linvit.data.options import InputOptions
from linvit.data.sources.folder import open_folder
from linvit.evaluation.collect import evaluate
from linvit.evaluation.command import evaluate_command
from linvit.evaluation.options import EvalOptions
from linvit.runs.folder import load_classifier


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), val=5)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crop, mean and interpolation differ from every model's defaults, and classes are not in alphabetical order."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "classes.txt").write_text("red\nblue\ngreen\n")
    settings = {
        "crop_pct": 0.7,
        "mean": [0.1, 0.2, 0.3],
        "std": 0.3,
        "interpolation": "bilinear",
        "crop_mode": "squash",
    }
    ema = {"model_ema": True, "model_ema_decay": 0.5}
    assert train(data, folder, lr=3e-3, class_map=str(folder / "classes.txt"), **ema, **settings) == 0
    return folder / "run"


def evaluated(source: Path, data: Path, tmp_path: Path, **options: Any) -> Any:
    settings = {"source": str(source), "data_dir": data, "workers": 0, "json_file": tmp_path / "eval.json", **options}
    assert evaluate_command(EvalOptions.model_validate(settings)) == 0
    return json.loads((tmp_path / "eval.json").read_text())


def columns(row: dict[str, str], prefix: str = "eval") -> tuple[float, ...]:
    return tuple(float(row[f"{prefix}_{name}"]) for name in ("top1", "top5", "loss"))


def values(result: dict[str, Any]) -> tuple[float, ...]:
    return result["top1"], result["top5"], result["loss"]


def test_results_equal_those_of_training_to_the_last_digit(run: Path, data: Path, tmp_path: Path) -> None:
    row = read_summary(run)[-1]
    assert values(evaluated(run, data, tmp_path, weights="last")) == columns(row)
    state = run / "checkpoints/state-0002-000000"
    assert values(evaluated(state, data, tmp_path)) == columns(row)
    assert values(evaluated(state, data, tmp_path, use_ema=True)) == columns(row, "eval_ema")
    assert columns(row) != columns(row, "eval_ema")
    config = json.loads((run / "best/config.json").read_text())["linvit"]
    prefix = {"raw": "eval", "ema": "eval_ema"}[config["weights"]]
    assert values(evaluated(run, data, tmp_path)) == columns(read_summary(run)[config["epoch"]], prefix)


def test_a_folder_with_config_is_enough(run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "last", tmp_path / "copy")
    # The folder does not contain the batch size, which changes the last digits.
    found = evaluated(tmp_path / "copy", data, tmp_path, batch_size=SETTINGS["batch_size"])
    assert values(found) == columns(read_summary(run)[-1])


def test_mixed_precision_is_the_runs_own(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, amp=True, epochs=1) == 0
    row = read_summary(tmp_path / "run")[-1]
    assert values(evaluated(tmp_path / "run", data, tmp_path)) == columns(row)
    assert values(evaluated(tmp_path / "run", data, tmp_path, amp=False)) != columns(row)


def test_json_describes_model_data_and_results(run: Path, data: Path, tmp_path: Path) -> None:
    found = evaluated(run, data, tmp_path)
    assert {"top1", "top5", "loss", "num_images", "img_size", "num_tokens", "per_class"} <= found.keys()
    assert (found["num_images"], found["img_size"], found["num_tokens"]) == (15, 32, 16)
    assert list(found["per_class"]) == ["red", "blue", "green"]
    assert sum(found["per_class"].values()) / 3 == pytest.approx(found["top1"])
    assert found["images_per_class"] == {"red": 5, "blue": 5, "green": 5}
    assert (found["model"], found["labels"]) == (SETTINGS["model"], "by name")
    assert found["weights"] == str(run / "best/model.safetensors")
    assert found["images_per_second"] > 0


def test_several_sizes_give_a_list_and_a_table(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(run), str(data), "--img-size", "32", "48x64", "--workers", "0"]
    assert main([*arguments, "--json", str(tmp_path / "eval.json")]) == 0
    first, second = json.loads((tmp_path / "eval.json").read_text())
    assert (first["img_size"], first["num_tokens"]) == (32, 16)
    assert (second["img_size"], second["num_tokens"]) == ([48, 64], 48)
    assert values(first) == values(evaluated(run, data, tmp_path))
    shown = capsys.readouterr().out
    assert "48×64" in shown
    assert f"{second['top1']:.2f}" in shown


def test_another_size_equals_set_input_size(run: Path, data: Path, tmp_path: Path) -> None:
    found = evaluated(run, data, tmp_path, img_size=(64,))
    classifier = load_classifier(str(run))
    classifier.model.set_input_size((64, 64))
    settings = {name: classifier.settings[name] for name in InputOptions.model_fields}
    spec = resolve_input(classifier.model, InputOptions(**settings | {"img_size": (64, 64)}))
    dataset = open_folder(data, split="val", class_names=classifier.class_names)
    loader = create_eval_loader(dataset, spec, batch_size=SETTINGS["batch_size"], workers=0, device="cpu")
    metrics = evaluate(classifier.model, loader, device=torch.device("cpu"))
    assert (metrics.top1, metrics.loss) == (found["top1"], pytest.approx(found["loss"], rel=1e-6))


def test_evaluation_does_not_change_the_model(run: Path, data: Path) -> None:
    model = load_classifier(str(run)).model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spec = resolve_input(model, InputOptions())
    dataset = open_folder(data, split="val", class_names=["red", "blue", "green"])
    loader = create_eval_loader(dataset, spec, batch_size=4, workers=0, device="cpu")
    evaluate(model, loader, device=torch.device("cpu"))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_plain_weights_need_the_models_name(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(load_file(run / "last/model.safetensors"), weights)
    with pytest.raises(ValueError, match=r"weights.safetensors does not name its model: give --model NAME"):
        evaluated(weights, data, tmp_path)
    config = json.loads((run / "last/config.json").read_text())
    preparation = {"crop_pct": 0.7, "mean": (0.1, 0.2, 0.3), "std": (0.3,) * 3, "interpolation": "bilinear"}
    shape = {
        name: config["model_args"][name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "k")
    }
    found = evaluated(
        weights,
        data,
        tmp_path,
        model=SETTINGS["model"],
        model_kwargs=shape,
        crop_mode="squash",
        batch_size=8,
        **preparation,
    )
    assert (found["num_images"], found["model"]) == (15, SETTINGS["model"])
    # The weights contain no class names either, and the run's order differs from that of the folders.
    assert found["labels"] == "by order"
    assert list(found["per_class"]) == ["blue", "green", "red"]
    assert "the weights contain no class names" in capsys.readouterr().out
    with pytest.raises(ValueError, match="does not fit"):
        evaluated(weights, data, tmp_path, model="linvit_mini_patch8_288")


def test_classes_are_matched_by_name(run: Path, data: Path, tmp_path: Path) -> None:
    # With one folder less, labels by order would shift.
    for name, change in (("renamed", "rename"), ("missing", "remove"), ("more", "add")):
        folder = tmp_path / name
        shutil.copytree(data / "val", folder / "val")
        if change == "rename":
            (folder / "val/blue").rename(folder / "val/azure")
        elif change == "remove":
            shutil.rmtree(folder / "val/blue")
        else:
            shutil.copytree(folder / "val/red", folder / "val/amber")
        with pytest.raises(ValueError, match={"rename": "'azure'", "remove": "'blue'", "add": "'amber'"}[change]):
            evaluated(run, folder, tmp_path)


def test_a_model_without_class_names_needs_as_many_classes(run: Path, data: Path, tmp_path: Path) -> None:
    model = timm.create_model("linvit_mini_patch4_64", num_classes=4)
    timm.models.save_for_hf(model, tmp_path / "model", safe_serialization=True)
    with pytest.raises(ValueError, match=r"has 4 unnamed classes, but .* has 3"):
        evaluated(tmp_path / "model", data, tmp_path)


def test_a_timm_name_knows_imagenets_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = linvit.runs.folder.create_model

    def untrained(name: str, *, pretrained: bool, **arguments: Any) -> Any:
        assert pretrained
        return create(name, **arguments)

    monkeypatch.setattr(linvit.runs.folder, "create_model", untrained)
    data = make_images(tmp_path / "data", classes=("n01440764", "n03888257"))
    settings = {"img_size": (32,), "batch_size": 4}
    with pytest.raises(ValueError, match=r"lacks 'n01443537', .* of the 1000 classes of vit_tiny_patch16_224; add "):
        evaluated(Path("vit_tiny_patch16_224"), data, tmp_path, **settings)
    found = evaluated(Path("vit_tiny_patch16_224"), data, tmp_path, allow_subset=True, **settings)
    assert (found["num_images"], found["num_classes"], found["num_present_classes"]) == (6, 1000, 2)
    assert found["images_per_class"] == {"n01440764": 3, "n03888257": 3}
    assert (found["weights"], found["labels"]) == ("vit_tiny_patch16_224", "by WordNet id")


@pytest.mark.parametrize(
    ("source", "status", "sentence"),
    [
        ("linvit_mini_patch4_46", 2, "unknown model 'linvit_mini_patch4_46'; did you mean 'linvit_mini_patch4_64'?"),
        ("runs/nothing", 1, "runs/nothing: there is no such file or folder, and it is not a timm model name"),
        (".", 1, "is neither a run nor a folder with config.json"),
    ],
)
def test_an_invalid_source_is_one_sentence(
    source: str,
    status: int,
    sentence: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", source, str(data)]) == status
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_an_unreadable_image_stops_the_evaluation_or_is_listed_and_not_counted(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("with", "without"):
        shutil.copytree(data / "val", tmp_path / split / "val")
    broken = [tmp_path / "with/val" / name for name in ("blue/0.png", "green/3.png")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
        (tmp_path / "without" / path.relative_to(tmp_path / "with")).unlink()
    with pytest.raises(ValueError, match=r"blue/0\.png: is truncated"):
        evaluated(run, tmp_path / "with", tmp_path)
    capsys.readouterr()
    # One image at a time, so that all batches are equal.
    found = evaluated(run, tmp_path / "with", tmp_path, on_bad_image="skip", batch_size=1)
    shown = capsys.readouterr().out
    assert f"2 of 15 images cannot be read and are not counted: {broken[0]}, {broken[1]}\n" in shown
    assert (found["num_images"], found["num_unreadable"]) == (13, 2)
    assert found["unreadable"] == [str(path) for path in broken]
    assert found["images_per_class"] == {"red": 5, "blue": 4, "green": 4}
    expected = evaluated(run, tmp_path / "without", tmp_path, batch_size=1)
    assert (expected["num_unreadable"], expected["unreadable"]) == (0, [])
    assert values(found) == values(expected)
    assert found["per_class"] == expected["per_class"]


def test_nothing_to_evaluate_is_an_error(run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "val", tmp_path / "val")
    for path in tmp_path.glob("val/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 15 images to evaluate on can be read"):
        evaluated(run, tmp_path, tmp_path, on_bad_image="skip")


@pytest.mark.parametrize("options", [{}, {"temperature": "fit"}, {"tta": "hflip"}])
def test_an_output_that_is_not_finite_is_an_error(
    options: dict[str, Any], run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **settings: Any) -> Any:
        classifier = load_classifier(*arguments, **settings)
        classifier.model.register_forward_hook(lambda *_: _[-1].index_fill(0, torch.tensor([0]), math.nan))
        return classifier

    monkeypatch.setattr("linvit.evaluation.inference.load_classifier", load)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: the model's output is NaN or infinite for 2 of 15 images"
    ):
        evaluated(run, data, tmp_path, **options)
    assert not (tmp_path / "eval.json").exists()


def test_a_run_without_weights_is_an_error(run: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    shutil.copy(run / "args.yaml", tmp_path / "new")
    with pytest.raises(ValueError, match="new is a run without best/ weights yet"):
        evaluated(tmp_path / "new", data, tmp_path)


def test_a_missing_split_is_an_error(run: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no split 'holdout'"):
        evaluated(run, data, tmp_path, split="holdout")


def test_options_read_sizes_as_people_write_them() -> None:
    options = EvalOptions(source="a", data_dir="b", img_size=["224", "768x512", (3, 4)])
    assert options.img_size == (224, (768, 512), (3, 4))
    with pytest.raises(ValueError, match="neither a number nor HEIGHTxWIDTH"):
        EvalOptions(source="a", data_dir="b", img_size=["224px"])


def test_states_contain_only_plain_values(run: Path) -> None:
    # read_state loads with weights_only=True.
    assert read_state(run, "state-0002-000000")["class_names"] == ["red", "blue", "green"]


def test_classes_of_unnamed_weights_come_from_a_map_or_an_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"class{number}" for number in range(1, 13)]
    data = make_images(tmp_path / "data", classes=tuple(names), train=1, val=1)
    model = timm.create_model(SETTINGS["model"], **SETTINGS["model_kwargs"], k=4, img_size=32, num_classes=12)
    torch.nn.init.normal_(model.head.weight, std=3.0)
    sources = {"timm": names, "torchvision": sorted(names), "unnamed": None}
    for name, labels in sources.items():
        arguments = {**SETTINGS["model_kwargs"], "k": 4, "img_size": 32}
        about = {"model_args": arguments, "label_names": labels}
        timm.models.save_for_hf(model, tmp_path / name, model_config=about, safe_serialization=True)
    (tmp_path / "map.json").write_text(json.dumps({name: label for label, name in enumerate(names)}))
    expected = {name: values(evaluated(tmp_path / name, data, tmp_path)) for name in ("timm", "torchvision")}
    assert expected["timm"] != expected["torchvision"]
    for class_map, order in {"timm": "timm", "torchvision": "torchvision", tmp_path / "map.json": "timm"}.items():
        assert values(evaluated(tmp_path / "unnamed", data, tmp_path, class_map=class_map)) == expected[order]
    assert main(["eval", str(tmp_path / "unnamed"), str(data), "-j", "0"]) == 1
    assert "--class-map timm" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "timm"), str(data), "-j", "0", "--class-map", "torchvision"]) == 1
    assert "has class names of its own" in capsys.readouterr().err
    image = str(data / "val/class1/0.png")
    assert (
        main(["predict", str(tmp_path / "unnamed"), image, "-j", "0", "--class-map", str(tmp_path / "map.json")]) == 0
    )
    assert "class" in capsys.readouterr().out
    for command in (["eval", str(tmp_path / "unnamed"), str(data)], ["predict", str(tmp_path / "unnamed"), image]):
        assert main([*command, "--class-map", "nosuch.txt"]) == 2
        assert "--class-map nosuch.txt: there is no such file or folder" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("class1\n")
    assert main(["predict", str(tmp_path / "unnamed"), image, "--class-map", str(tmp_path / "short.txt")]) == 1
    assert "names 1 classes, but" in capsys.readouterr().err
