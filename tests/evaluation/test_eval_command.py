"""`linvit eval`: subsets of classes, comparisons, views, temperature, files, several processes."""

import csv
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import cv2
import pytest
import timm
import torch
from rich.console import Console
from tiny_runs import make_images, train

from linvit.cli import main
from linvit.data.sources.open import open_images
from linvit.evaluation.classes import real_labels, synsets
from linvit.evaluation.collect import evaluate
from linvit.evaluation.command import evaluate_command
from linvit.evaluation.options import EvalOptions
from linvit.output.terminal import progress_bar
from linvit.runs.folder import load_classifier

CLASSES = ["n01440764", "n02102040", "n03888257"]
MODEL = {"model_name": "linvit_mini_patch4_64", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "k": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), classes=tuple(CLASSES), val=5)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert train(data, folder, lr=3e-3, epochs=1) == 0
    return folder / "run"


def saved(folder: Path, class_names: list[str] | None, *, num_classes: int, seed: int = 0) -> Path:
    """A folder with an untrained model for these classes."""
    torch.manual_seed(seed)
    name, *_ = MODEL.values()
    settings = {key: value for key, value in MODEL.items() if key != "model_name"}
    model = timm.create_model(name, img_size=32, num_classes=num_classes, **settings)
    # With the initial weights all logits are nearly equal.
    torch.nn.init.normal_(model.head.weight, std=3.0)
    config = {"model_args": {"img_size": 32, **settings}, "label_names": class_names}
    timm.models.save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return folder


def evaluated(source: Path, data: Path, tmp_path: Path, **options: Any) -> Any:
    fixed = {"workers": 0, "batch_size": 4, "bootstrap": 20, "json_file": tmp_path / "eval.json"}
    settings = {"source": str(source), "data_dir": data, **fixed, **options}
    assert evaluate_command(EvalOptions.model_validate(settings)) == 0
    return json.loads((tmp_path / "eval.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_subset_is_reported_among_all_classes_and_among_its_own(data: Path, tmp_path: Path) -> None:
    names = ["n01443537", *reversed(CLASSES), "n01484850"]
    source = saved(tmp_path / "model", names, num_classes=5)
    found = evaluated(source, data, tmp_path, allow_subset=True, csv_file=tmp_path / "images.csv")
    kept = rows(tmp_path / "images.csv")
    assert [row["label"] for row in kept] == [name for name in CLASSES for _ in range(5)]
    assert {row["masked_prediction"] for row in kept} <= set(CLASSES)
    assert {row["prediction"] for row in kept} - set(CLASSES), "no image was predicted as a class that the data lacks"
    for scores, prefix in ((found, ""), (found["masked"], "masked_")):
        hits = [row["label"] == row[f"{prefix}prediction"] for row in kept]
        assert [row[f"{prefix}correct"] for row in kept] == [str(int(hit)) for hit in hits]
        assert scores["top1"] == pytest.approx(100 * sum(hits) / 15)
        assert scores["loss"] == pytest.approx(math.fsum(float(row[f"{prefix}loss"]) for row in kept) / 15, rel=1e-7)
    assert found["masked"]["loss"] < found["loss"]
    assert found["notes"] == ["the data has 3 of the model's 5 classes"]


def test_masking_removes_the_other_logits(data: Path, tmp_path: Path) -> None:
    names = ["n01443537", *reversed(CLASSES), "n01484850"]
    five = saved(tmp_path / "five", names, num_classes=5)
    three = saved(tmp_path / "three", list(reversed(CLASSES)), num_classes=3)
    weights = timm.create_model(f"local-dir:{five}", pretrained=True)
    model = timm.create_model(f"local-dir:{three}", pretrained=True)
    state = {name: value[1:4] if name.startswith("head.") else value for name, value in weights.state_dict().items()}
    model.load_state_dict(state)
    config = json.loads((three / "config.json").read_text())
    timm.models.save_for_hf(
        model,
        three,
        model_config={"model_args": config["model_args"], "label_names": config["label_names"]},
        safe_serialization=True,
    )
    masked = evaluated(five, data, tmp_path, allow_subset=True)["masked"]
    expected = evaluated(three, data, tmp_path)
    for name in ("top1", "top5", "macro_f1", "balanced_accuracy", "per_class", "most_confused"):
        assert masked[name] == expected[name]
    assert (masked["loss"], masked["ece"]) == pytest.approx((expected["loss"], expected["ece"]), rel=1e-5)


def test_images_of_unknown_classes_are_skipped(run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "val", tmp_path / "data/val")
    # In the middle, so that every later index changes.
    shutil.copytree(data / "val" / CLASSES[0], tmp_path / "data/val/n02000000")
    with pytest.raises(ValueError, match="'n02000000' is not among the 3 classes of"):
        evaluated(run, tmp_path / "data", tmp_path)
    expected = evaluated(run, data, tmp_path, csv_file=tmp_path / "expected.csv")
    found = evaluated(run, tmp_path / "data", tmp_path, allow_subset=True, csv_file=tmp_path / "more.csv")
    assert (found["top1"], found["loss"]) == (expected["top1"], pytest.approx(expected["loss"], rel=1e-6))
    assert "skipped the images of 'n02000000'" in found["notes"][0]
    names = [[Path(row["path"]).parts[-2:] for row in rows(tmp_path / name)] for name in ("expected.csv", "more.csv")]
    assert names[0] == names[1]


def test_lemmas_and_numbers_name_the_same_images(run: Path, data: Path, tmp_path: Path) -> None:
    expected = evaluated(run, data, tmp_path)
    for name, folders in (("lemma", ["tench", "English_springer", "parachute"]), ("index", ["0", "1", "2"])):
        for wnid, folder in zip(CLASSES, folders):
            shutil.copytree(data / "val" / wnid, tmp_path / name / "val" / folder)
        found = evaluated(run, tmp_path / name, tmp_path)
        assert found["labels"] == f"by {name}"
        assert (found["top1"], found["per_class"]) == (expected["top1"], expected["per_class"])


def test_sources_are_compared_image_by_image(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [*reversed(CLASSES), "n01443537", "n01484850", "n01491361"]
    other = saved(tmp_path / "other", names, num_classes=6)
    first, second = evaluated(
        run, data, tmp_path, compare=(str(other),), allow_subset=True, csv_file=tmp_path / "images.csv"
    )
    kept = rows(tmp_path / "images.csv")
    ours, theirs = ([row for row in kept if row["source"] == str(source)] for source in (run, other))
    assert [row["path"] for row in ours] == [row["path"] for row in theirs]
    assert [row["correct"] for row in theirs] != [row["masked_correct"] for row in theirs]
    hits = [(row["correct"] == "1", other_row["masked_correct"] == "1") for row, other_row in zip(ours, theirs)]
    against = second["against_first"]
    assert "against_first" not in first
    assert (against["only_baseline"], against["only_here"]) == (hits.count((True, False)), hits.count((False, True)))
    assert against["is_masked"]
    assert against["num_images"] == 15
    assert "Compared with run at 32, top-1 in percentage points:" in capsys.readouterr().out


def test_sources_that_know_other_classes_are_compared_on_what_both_know(run: Path, data: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", [CLASSES[2], CLASSES[1]], num_classes=2)
    _, second = evaluated(
        run, data, tmp_path, compare=(str(other),), allow_subset=True, csv_file=tmp_path / "images.csv"
    )
    hits = {(row["source"], row["path"]): row["correct"] == "1" for row in rows(tmp_path / "images.csv")}
    pairs = [(hits[str(run), path], hit) for (source, path), hit in hits.items() if source == str(other)]
    against = second["against_first"]
    assert against["num_images"] == len(pairs) == 10
    assert (against["only_baseline"], against["only_here"]) == (pairs.count((True, False)), pairs.count((False, True)))
    assert pairs.count((False, True)) != pairs.count((True, False))


def test_views_are_averaged(run: Path, data: Path, tmp_path: Path) -> None:
    # At the model's size, so that the crop does not depend on mirroring.
    square, mirrored = tmp_path / "square", tmp_path / "mirrored"
    for folder in (square, mirrored):
        shutil.copytree(data / "val", folder / "val")
        for path in folder.glob("val/*/*.png"):
            image = cv2.imread(str(path))[:32, :32]
            assert cv2.imwrite(str(path), image if folder == square else cv2.flip(image, 1))
    one, other = (evaluated(run, folder, tmp_path, crop_pct=1.0)["loss"] for folder in (square, mirrored))
    both = evaluated(run, square, tmp_path, crop_pct=1.0, tta="hflip")
    assert min(one, other) < both["loss"] < max(one, other)
    assert both["loss"] == pytest.approx(
        evaluated(run, mirrored, tmp_path, crop_pct=1.0, tta="hflip")["loss"], rel=1e-6
    )
    assert both["views"] == {"sizes": [[32, 32]], "flips": "hflip"}


def test_scales_are_sizes_of_the_model(run: Path, data: Path, tmp_path: Path) -> None:
    assert evaluated(run, data, tmp_path, tta_scales=(1.0,))["loss"] == evaluated(run, data, tmp_path)["loss"]
    larger = evaluated(run, data, tmp_path, tta_scales=(1.5,))
    assert larger["loss"] == evaluated(run, data, tmp_path, img_size=(48,))["loss"]
    both = evaluated(run, data, tmp_path, tta_scales=(1.0, 1.5))
    assert both["views"]["sizes"] == [[32, 32], [48, 48]]
    assert both["loss"] not in (larger["loss"], evaluated(run, data, tmp_path)["loss"])


def test_a_temperature_is_never_evaluated_on_the_images_it_was_fitted_on(run: Path, data: Path, tmp_path: Path) -> None:
    half = evaluated(run, data, tmp_path, temperature="fit")["calibration"]
    assert (half["fitted_on"], half["num_images"]) == ("a random half (7 images)", 8)
    found = evaluated(run, data, tmp_path, temperature="fit", temperature_split="train")
    other = found["calibration"]
    assert (other["fitted_on"], other["num_images"]) == ("split train", 15)
    assert other["loss_before"] == pytest.approx(found["loss"], rel=1e-6)
    assert other["ece_before"] == pytest.approx(found["ece"], rel=1e-6)
    given = evaluated(run, data, tmp_path, temperature=other["temperature"])["calibration"]
    assert {**given, "fitted_on": "split train"} == other
    unchanged = evaluated(run, data, tmp_path, temperature=1.0)["calibration"]
    assert (unchanged["loss"], unchanged["ece"]) == pytest.approx((found["loss"], found["ece"]), rel=1e-6)


def test_all_files_are_written(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: str(tmp_path / name) for name in ("e.csv", "e.md", "m.csv", "m.png", "p.png")}
    fixed = ["eval", str(run), str(data), "-j", "0", "--bootstrap", "20"]
    outputs = ["--csv", files["e.csv"], "--markdown", files["e.md"], "--confusion", files["m.csv"], files["m.png"]]
    assert main([*fixed, *outputs]) == 0
    assert main([*fixed, "--img-size", "32", "48", "--plot", files["p.png"]]) == 0
    for name in ("m.png", "p.png"):
        assert cv2.imread(files[name]).std() > 10
    counts = [line.split(",")[1:] for line in Path(files["m.csv"]).read_text().splitlines()][1:]
    kept = rows(Path(files["e.csv"]))
    assert sum(int(count) for row in counts for count in row) == len(kept) == 15
    assert sum(int(row[i]) for i, row in enumerate(counts)) == sum(int(row["correct"]) for row in kept)
    markdown = Path(files["e.md"]).read_text()
    assert f"| {run} | 32 | 3 | " in markdown
    assert "n01440764 tench" in markdown
    assert "English springer" in capsys.readouterr().out


def test_files_are_written_before_tables_are_shown_and_json_has_stdout_to_itself(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["eval", str(run), str(data), "--workers", "0", "--bootstrap", "0", "--json", "-"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["num_images"] == 15
    assert "top-1 %" in err

    def fail(*arguments: Any) -> None:
        raise ValueError("not shown")

    monkeypatch.setattr("linvit.evaluation.show.show", fail)
    assert main([*arguments[:-1], str(tmp_path / "eval.json"), "--csv", str(tmp_path / "eval.csv")]) == 1
    assert json.loads((tmp_path / "eval.json").read_text())["num_images"] == 15
    # The rows name images and labels, so the file is also a list of images.
    assert len(open_images(tmp_path / "eval.csv", split="eval.csv")) == 15


def test_progress_is_shown_on_a_terminal(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr("linvit.evaluation.source.progress_bar", lambda **options: progress_bar(terminal, **options))
    evaluated(run, data, tmp_path)
    assert "evaluating" in shown.getvalue()
    assert "15/15" in shown.getvalue()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--json", "o", "--csv", "./o"], "--json and --csv are both o; choose two files"),
        (["--json", "link", "--csv", "o"], "--json and --csv are both o; choose two files"),
        (["--confusion", "a.csv", "a.csv"], "--confusion and --confusion are both a.csv; choose two files"),
        (["--json", "run/best/config.json"], "would replace a file that is read (run/best/config.json)"),
        (["--csv", "data/val/n01440764/0.png"], "would replace a file that is read (data/val)"),
    ],
)
def test_an_output_is_neither_another_output_nor_an_input(
    flags: list[str],
    words: str,
    run: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for link, target in (("link", "o"), ("run", run), ("data", data)):
        (tmp_path / link).symlink_to(target)
    assert main(["eval", "run", "data", *flags]) == 2
    assert words in capsys.readouterr().err


def test_results_beside_the_splits_may_be_written_again(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/val").symlink_to(data / "val")
    for file in ("data/images.csv", "data/confusion.png"):
        Path(file).write_text("old")
    arguments = ["--csv", "data/images.csv", "--confusion", "data/confusion.png", "--bootstrap", "0", "--workers", "0"]
    assert main(["eval", str(run), "data", *arguments]) == 0
    assert "old" not in (Path("data/images.csv").read_text(), Path("data/confusion.png").read_text(errors="replace"))
    # A list of the split may be read.
    Path("data/val.csv").write_text("path,label")
    assert main(["eval", str(run), "data", "--csv", "data/val.csv"]) == 2
    assert Path("data/val.csv").read_text() == "path,label"


def test_real_labels_go_by_the_number_in_the_file_name(tmp_path: Path) -> None:
    names = list(synsets())
    data, rng = tmp_path / "data", torch.Generator().manual_seed(0)
    for number in range(1, 9):
        image = torch.randint(0, 255, (32, 32, 3), generator=rng, dtype=torch.uint8).numpy()
        folder = data / "val" / names[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / f"ILSVRC2012_val_{number:08d}.JPEG"), image)
    source = saved(tmp_path / "model", names, num_classes=1000)
    found = evaluated(source, data, tmp_path, allow_subset=True, real_labels=True, csv_file=tmp_path / "images.csv")
    counted, hits = 0, 0
    for row in rows(tmp_path / "images.csv"):
        allowed = real_labels()[int(Path(row["path"]).stem[-8:]) - 1]
        counted += bool(allowed)
        hits += names.index(row["prediction"]) in allowed
    assert 0 < counted < 8, "the first image has no correct label"
    assert (found["real"]["num_images"], found["real"]["top1"]) == (counted, pytest.approx(100 * hits / counted))
    next(data.glob("val/*/*2.JPEG")).rename(data / "val" / names[0] / "cat.JPEG")
    with pytest.raises(ValueError, match=r"cat\.JPEG is not an image of ImageNet's validation set"):
        evaluated(source, data, tmp_path, allow_subset=True, real_labels=True)


class Hungry(torch.nn.Module):
    """A model that runs out of memory with more than three images at once."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        logits: torch.Tensor = self.model(images)
        return logits


def test_batches_that_do_not_fit_are_halved(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from linvit.data.augment.build import resolve_input
    from linvit.data.loader import create_eval_loader
    from linvit.data.options import InputOptions
    from linvit.data.sources.folder import open_folder

    model = load_classifier(str(run)).model
    images = open_folder(data, split="val")
    loader = create_eval_loader(images, resolve_input(model, InputOptions()), batch_size=8, workers=0, device="cpu")
    device = torch.device("cpu")
    expected, found = (evaluate(each, loader, device=device) for each in (model, Hungry(model)))
    assert found.top1 == expected.top1
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    messages = capsys.readouterr().err
    assert messages.splitlines() == [
        "out of memory with 8 images at once; continuing with 4",
        "out of memory with 4 images at once; continuing with 2",
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--temperature-split", "train"], "--temperature-split needs --temperature fit"),
        (
            ["--temperature", "fit", "--temperature-split", "val"],
            "--temperature-split val is the split to evaluate; choose another, or omit the option",
        ),
        (["--temperature", "-1"], "--temperature takes 'fit' or a number greater than 0, or none, not -1"),
        (["--confusion", "a.svg"], "--confusion a.svg: the name must end in .png or .csv"),
        (
            ["--confusion", "a.png", "--img-size", "32", "64"],
            "--confusion takes one source at one size; omit --compare",
        ),
        (["--plot", "a.png"], "--plot takes a .png file and needs several sizes"),
        (["--tta", "vflip"], "--tta takes one of 'none', 'hflip', not 'vflip'"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "run", "data", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_file_that_cannot_be_written_is_an_error_before_the_work(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "no-run", str(data), "--json", str(tmp_path / "no/eval.json")]) == 2
    assert f"no/eval.json: folder {tmp_path}/no does not exist; create it first" in capsys.readouterr().err
