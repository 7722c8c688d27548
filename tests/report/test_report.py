"""The page of a run: what training writes, what `linvit report` makes of complete and of damaged folders."""

import base64
import csv
import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hostile_runs import HOSTILE, Page, make_hostile_list, train_run
from PIL import Image

from linvit.cli import main
from linvit.data.sources.open import open_images
from linvit.evaluation.predictions import read_predictions
from linvit.output.files import printable
from linvit.report import gather as gather_module
from linvit.report.examples import worst_images
from linvit.report.gather import gather, open_data
from linvit.report.run import read_run
from linvit.runs.folder import load_classifier
from linvit.runtimes.model import ExportedModel
from linvit.training.config import TrainConfig

MOST_BYTES = 5_000_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hostile_list(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report.html."""
    return train_run(data, tmp_path_factory.mktemp("runs"), report=True)


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text())


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, without its page."""
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("report.html", "checkpoints"))
    return tmp_path / "copy"


def report(*arguments: Any) -> Page:
    """The page that `linvit report` writes for these arguments; the first is the run's folder."""
    assert main(["report", *map(str, arguments)]) == 0
    return Page((Path(arguments[0]) / "report.html").read_text())


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_training_writes_a_page_with_the_figures_of_the_run(run: Path, page: Page) -> None:
    rows, best = rows_of(run), json.loads((run / "best/config.json").read_text())["linvit"]
    assert f"{best['metrics']['top1']:.2f} %" in page.text
    curves = {chart["title"]: chart for chart in json.loads(page.scripts["data-curves"])}
    loss = {series["name"]: series["values"] for series in curves["Loss"]["series"]}
    assert loss == {
        "training": [float(row["train_loss"]) for row in rows],
        "validation": [float(row["eval_loss"]) for row in rows],
        "validation, averaged (EMA)": [float(row["eval_ema_loss"]) for row in rows],
    }
    expected = ["Loss", "Top-1 accuracy", "Top-5 accuracy", "Learning rate", "Images per second"]
    assert list(curves)[:5] == expected
    assert {"Waiting for data, share of the time", "Peak memory"} == set(curves) - set(expected)
    assert "No update was skipped or refused." in page.text
    assert "24 images, 6 classes" in page.text
    # Worst images with heat maps, and augmented images.
    alts = [image["alt"] for image in page.all("img")]
    assert sum(alt.startswith("where the model looks") for alt in alts if alt) == 12
    assert sum("original" in alt for alt in alts if alt) == 4
    assert len(alts) == 2 * 12 + 4 * 5


def test_a_page_contains_hostile_names_as_text_only_and_loads_nothing(run: Path, page: Page) -> None:
    text = (run / "report.html").read_text()
    assert len(text) < MOST_BYTES
    assert "http" not in text.replace("http-equiv", "")
    for name in HOSTILE:
        assert printable(name) in page.text
    # One program; all other scripts are data.
    kinds = [script.get("type") for script in page.all("script")]
    assert kinds.count(None) == 1
    assert set(kinds) == {None, "application/json"}
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    matrix = json.loads(page.scripts["data-matrix-0"])
    assert sorted(matrix["names"]) == sorted(map(printable, HOSTILE))


def test_the_list_of_predictions_and_the_page_are_those_of_eval(
    run: Path, data: Path, page: Page, tmp_path: Path
) -> None:
    assert main(["eval", str(run), str(data), "-j", "0", "--json", str(tmp_path / "e.json")]) == 0
    expected = json.loads((tmp_path / "e.json").read_text())
    config = json.loads((run / "best/config.json").read_text())
    found = read_predictions(run / "predictions.csv", config["label_names"])
    metrics = found.results.metrics(found.class_names)
    assert (metrics.top1, metrics.top5) == (expected["top1"], expected["top5"])
    assert math.isclose(metrics.loss, expected["loss"], rel_tol=1e-8)
    assert metrics.per_class == expected["per_class"]
    for name in ("top1", "balanced_accuracy", "macro_f1", "ece"):
        low, high = expected["confidence"][name]
        assert f"{expected[name]:.2f} %95 %: {low:.1f} to {high:.1f}" in page.text.replace("\n", "")


def test_a_report_without_recorded_predictions_evaluates_the_data(copy: Path, data: Path, page: Page) -> None:
    (copy / "predictions.csv").unlink()
    without = report(copy, "--device", "cpu")
    assert "There are no predictions in the folder" in without.text
    assert "data-matrix-0" not in without.scripts
    again = report(copy, "--data", data, "--device", "cpu")
    assert "There are no predictions" not in again.text
    assert again.scripts["data-matrix-0"] == page.scripts["data-matrix-0"]
    # Predictions of another epoch are not passed off as those of the best weights.
    config = json.loads((copy / "best/config.json").read_text())
    config["linvit"]["metrics"]["loss"] += 0.5
    (copy / "best/config.json").write_text(json.dumps(config))
    (copy / "predictions.csv").write_text(
        "path,label,prediction,probability,loss,correct,in_top5\n0.png,plain,plain,0.5,0.7,1,1\n"
    )
    assert read_run(copy).predictions is None


def killed(run: Path) -> None:
    for name in ("summary.csv", "predictions.csv", "README.md"):
        (run / name).unlink()
    for name in ("best", "last"):
        shutil.rmtree(run / name)


def with_nan(run: Path) -> None:
    without_data(run)
    rows = rows_of(run)
    rows[0]["train_loss"], rows[1]["eval_loss"] = "nan", "inf"
    with (run / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def one_epoch(run: Path) -> None:
    without_data(run)
    lines = (run / "summary.csv").read_text().splitlines()
    (run / "summary.csv").write_text("\n".join(lines[:2]) + "\n")


def without_data(run: Path) -> None:
    text = (run / "args.yaml").read_text().splitlines()
    (run / "args.yaml").write_text("\n".join("data_dir: nowhere" if "data_dir" in line else line for line in text))


def without_weights(run: Path) -> None:
    (run / "best/model.safetensors").write_bytes(b"broken")


@pytest.mark.parametrize(
    ("damage", "words", "has_evaluation"),
    [
        (killed, "No epoch was finished.", False),
        (with_nan, "No update was skipped", True),
        (one_epoch, "1 of 2", True),
        (without_data, "the run's data cannot be opened (nowhere: no such folder", True),
        (without_weights, "The best weights cannot be loaded", True),
    ],
)
def test_runs_that_lack_something_have_a_page_that_says_so(damage, words, has_evaluation, copy: Path) -> None:
    damage(copy)
    found = report(copy, "--device", "cpu")
    assert words in found.text
    assert ("data-matrix-0" in found.scripts) == has_evaluation
    if damage is with_nan:
        loss = json.loads(found.scripts["data-curves"])[0]["series"]
        assert (loss[0]["values"][0], loss[1]["values"][1]) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["{tmp}/none"], 1, "{tmp}/none: no such folder; give the folder of a run"),
        (["{tmp}"], 1, "{tmp}: is not the folder of a run, since it has no args.yaml"),
        (["{run}", "{run}"], 2, "several runs need a file to write to: -o FILE"),
        (["{run}", "-o", "{run}/args.yaml"], 2, "would replace a file that is read"),
        (["{run}", "-o", "{tmp}/no/x.html"], 2, "does not exist; create it first"),
        (["{run}", "--data", "{tmp}/none"], 1, "--data: {tmp}/none: no such folder"),
        (["{run}"], 1, "summary.csv: is damaged"),
    ],
)
def test_wrong_use_is_one_sentence(
    arguments: list[str], status: int, words: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "damaged" in words:
        (copy / "summary.csv").write_text("epoch,train_loss\n0,x\n")
    fill = {"tmp": tmp_path, "run": copy}
    assert main(["report", *(each.format(**fill) for each in arguments)]) == status
    captured = capsys.readouterr()
    assert words.format(**fill) in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_several_runs_are_side_by_side(run: Path, data: Path, copy: Path, tmp_path: Path) -> None:
    text = (copy / "args.yaml").read_text().replace("lr: 0.003", "lr: 0.001")
    (copy / "args.yaml").write_text(text)
    assert main(["report", str(run), str(copy), "-o", str(tmp_path / "both.html"), "--device", "cpu"]) == 0
    page = Page((tmp_path / "both.html").read_text())
    assert {"data-matrix-0", "data-matrix-1", "data-curves"} <= set(page.scripts)
    loss = json.loads(page.scripts["data-curves"])[0]["series"]
    assert [series["name"] for series in loss[::3]] == ["run, training", "copy, training"]
    assert "copy against run" in page.text.replace("\n", " ")
    assert "Accuracy of each class side by side" in page.text
    differing = [attributes for attributes in page.all("tr") if attributes.get("class") == "differs"]
    assert len(differing) == 1


def test_augmented_images_have_the_size_of_the_first_epochs(run: Path) -> None:
    read = read_run(run)
    data = open_data(read, None)
    assert data.config is not None
    small = replace(data, config=data.config.model_copy(update={"train_img_sizes": (16, 32)}))
    for each, side in ((data, 32), (small, 16)):
        page = gather(read, each, device=torch.device("cpu"), evaluate=False)
        pixels = base64.b64decode(page.augmented[0]["versions"][0].partition(",")[2])
        assert Image.open(io.BytesIO(pixels)).size == (side, side)


def test_runs_of_one_name_are_called_by_their_paths(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "last"))
    (tmp_path / "run/predictions.csv").unlink()
    assert main(["report", str(run), str(tmp_path / "run"), "-o", str(tmp_path / "both.html"), "--device", "cpu"]) == 0
    loss = json.loads(Page((tmp_path / "both.html").read_text()).scripts["data-curves"])[0]["series"]
    assert [series["name"] for series in loss[::3]] == [f"{run}, training", f"{tmp_path / 'run'}, training"]


def test_a_report_that_fails_is_a_warning(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig.load(copy / "args.yaml")
    images = open_images(config.data_dir or "", split="train")

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken\nsecond line")

    monkeypatch.setattr(gather_module, "gather", fail)
    gather_module.report_training(copy, config, images, images, device=torch.device("cpu"))
    assert f"warning: no report was written (broken); `linvit report {copy}` tries again\n" in capsys.readouterr().err
    assert not (copy / "report.html").exists()


def test_eval_writes_the_evaluation_half(run: Path, data: Path, page: Page, tmp_path: Path) -> None:
    path = tmp_path / "eval.html"
    arguments = [str(run), str(data), "-j", "0", "--html", str(path), "--img-size", "32", "48", "--device", "cpu"]
    assert main(["eval", *arguments]) == 0
    found = Page(path.read_text())
    assert found.scripts["data-matrix-0"] == page.scripts["data-matrix-0"]
    assert "data-matrix-1" in found.scripts
    assert "data-curves" not in found.scripts
    assert sum(str(image["alt"]).startswith("where the model looks") for image in found.all("img")) == 24
    assert "http" not in path.read_text().replace("http-equiv", "")
    assert len(path.read_text()) < MOST_BYTES


def test_images_without_heat_maps_say_why(run: Path, data: Path) -> None:
    config = json.loads((run / "best/config.json").read_text())
    found = read_predictions(run / "predictions.csv", config["label_names"])
    images = open_images(data, split="val", class_names=config["label_names"])
    classifier = load_classifier(str(run))
    other = replace(classifier, model=timm.create_model("test_resnet", num_classes=6))
    exported = replace(classifier, model=ExportedModel.__new__(ExportedModel))
    for given, seconds, words in (
        (other, 60, "There are no heat maps: "),
        (exported, 60, "There are no heat maps: they need the model itself"),
        (classifier, -1, "Heat maps took"),
    ):
        worst = worst_images(found, images, given, most=2, seconds=seconds)
        assert str(worst.note).startswith(words)
        assert [image["heat"] for image in worst.images] == [None, None]
        assert all(image["picture"] for image in worst.images)
