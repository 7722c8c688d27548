"""`linvit predict --heatmap`: a map beside each prediction."""

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image

from linvit.cli import main
from linvit.data.augment.build import resolve_input
from linvit.data.options import InputOptions
from linvit.explanation import overlay
from linvit.explanation.explain import Explainer
from linvit.runs.folder import load_classifier, save_classifier


def predict(*arguments: str | Path) -> int:
    return main(["predict", *map(str, arguments), "--workers", "0", "--device", "cpu"])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[np.ndarray, str]]:
    """The map and title of each picture that is written, by its path."""
    found: dict[str, tuple[np.ndarray, str]] = {}
    save = overlay.save_overlay

    def record(path: Path, image: np.ndarray, heat: np.ndarray, *, title: str) -> None:
        found[str(path)] = heat, title
        save(path, image, heat, title=title)

    monkeypatch.setattr("linvit.prediction.heatmaps.save_overlay", record)
    return found


def test_maps_are_those_of_explain_and_rows_name_them(
    run: Path, data: Path, tmp_path: Path, drawn: dict[str, tuple[np.ndarray, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.png").touch()
    images = [data / "val/red/0.png", tmp_path / "empty.png", data / "val/blue/0.png"]
    arguments = ["-o", tmp_path / "p.csv", "--topk", "1", "--heatmap", tmp_path / "new/maps"]
    assert predict(run, *images, *arguments, "--heatmap-method", "gradcam") == 0
    assert f"{tmp_path / 'new/maps'}: heat maps of 2 of 3 images\n" in capsys.readouterr().out
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label_1", "probability_1", "heatmap", "error"]
    assert [row["heatmap"] for row in rows] == [
        str(tmp_path / "new/maps/0.png"),
        "",
        str(tmp_path / "new/maps/0-2.png"),
    ]
    assert [row["error"] for row in rows] == ["", "is empty; restore or remove the file", ""]
    explainer = Explainer(load_classifier(str(run)))
    for row in (rows[0], rows[2]):
        image = np.asarray(Image.open(row["path"]))
        target = explainer.class_names.index(row["label_1"])
        heat, title = drawn[row["heatmap"]]
        np.testing.assert_allclose(heat, explainer.explain(image, method="gradcam", target=target).heat, rtol=1e-5)
        percent = 100 * float(row["probability_1"])
        assert title == f"{row['label_1']} {percent:.1f} % (gradcam for {row['label_1']})"
        assert Image.open(row["heatmap"]).format == "PNG"


def test_tiles_and_a_list_on_stdin(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    drawn: dict[str, tuple[np.ndarray, str]],
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 100, 3), dtype=np.uint8)).save(tmp_path / "wide.png")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{tmp_path}/wide.png\n{tmp_path}/no".encode())))
    monkeypatch.setattr("linvit.prediction.heatmaps.LARGEST", 50)
    arguments = ["--tile", "32", "--heatmap", tmp_path / "maps", "--topk", "1"]
    assert predict(run, "-", *arguments, "-o", tmp_path / "p.jsonl") == 0
    good, bad = (json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines())
    assert good["heatmap"] == str(tmp_path / "maps/wide.png")
    assert bad["heatmap"] is None
    assert "No such file" in bad["error"]
    # The map is no larger than its picture.
    heat, _ = drawn[good["heatmap"]]
    assert heat.shape == (20, 50)
    assert not np.isnan(heat).any()
    capsys.readouterr()
    # In a pipe, lines on stdout are predictions.
    assert predict(run, tmp_path / "wide.png", *arguments) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert out.rstrip("\n").split("\t")[3] == str(tmp_path / "maps/wide.png")
    assert err == f"{tmp_path / 'maps'}: heat maps of 1 of 1 images\n"


def test_an_image_without_a_map_keeps_its_prediction(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [shutil.copy(data / f"val/red/{number}.png", tmp_path) for number in (0, 1)]
    # Both are predicted in one batch, before the first map is written.
    monkeypatch.setattr("linvit.prediction.heatmaps.save_overlay", lambda *_, **__: Path(images[1]).unlink())
    assert predict(run, *images, "-o", tmp_path / "p.jsonl", "--heatmap", tmp_path / "maps") == 0
    first, second = (json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines())
    assert first["error"] is None
    assert len(second["labels"]) == 3
    assert second["heatmap"] is None
    assert second["error"] == "no heat map: cannot be read (No such file or directory); restore or remove the file"
    assert "heat maps of 1 of 2 images" in capsys.readouterr().out


def test_a_map_never_replaces_an_image(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data / "val/red"
    before = (folder / "0.png").read_bytes()
    (tmp_path / "link").symlink_to(folder)
    for command in (["predict", "--heatmap"], ["explain", "-o"]):
        assert main([command[0], str(run), str(folder / "0.png"), command[1], str(tmp_path / "link")]) == 2
        assert f"{tmp_path / 'link'}: a map would replace the image {folder / '0.png'}" in capsys.readouterr().err
    assert (folder / "0.png").read_bytes() == before


def test_wrong_usage_is_one_sentence(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = data / "val/red/0.png"
    (tmp_path / "file").touch()
    for arguments, status, words in (
        (["--heatmap-method", "rollout"], 2, "--heatmap-method needs --heatmap FOLDER"),
        (["--heatmap", tmp_path / "file"], 2, "is not a folder; give a folder"),
        (["--heatmap", tmp_path / "maps", "--heatmap-method", "keys"], 2, "--heatmap-method"),
    ):
        assert predict(run, image, *arguments) == status
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_a_model_without_attention_is_refused_before_it_predicts(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    save_classifier(
        tmp_path / "model", model, class_names=["a", "b", "c"], spec=resolve_input(model, InputOptions()), about={}
    )
    arguments = ["-o", tmp_path / "p.jsonl", "--heatmap", tmp_path / "maps"]
    assert predict(tmp_path / "model", data / "val/red/0.png", *arguments) == 1
    assert "is not a Vision Transformer" in capsys.readouterr().err
    assert not (tmp_path / "p.jsonl").exists()
    assert not (tmp_path / "maps").exists()


def test_classes_of_one_name_are_told_apart(
    run: Path, data: Path, tmp_path: Path, drawn: dict[str, tuple[np.ndarray, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = []
    explain = Explainer.explain

    def record(self: Explainer, image: np.ndarray, **settings: Any) -> Any:
        # Not the first class of this name, unless it is the predicted one.
        targets.append(settings["target"])
        return explain(self, image, **settings)

    monkeypatch.setattr(Explainer, "explain", record)
    names = ["crane"] * len(load_classifier(str(run)).class_names or [])
    monkeypatch.setattr("linvit.prediction.command._labels", lambda *_: names)
    assert predict(run, data / "val/blue/0.png", "--heatmap", tmp_path / "maps") == 0
    assert targets == [None]
    assert len(drawn) == 1
