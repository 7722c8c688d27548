"""`linvit explain`: files, figures, tiles and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
from coloured import COLOURS, coloured_square
from PIL import Image
from timm.models import save_for_hf

from linvit.cli import main
from linvit.data.tiling import create_tiling
from linvit.explanation import explain as explain_module
from linvit.runs.folder import load_classifier


def explain(*arguments: str | Path) -> int:
    return main(["explain", *map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize("method", ["relevance", "gradcam", "cam"])
def test_maps_point_at_the_square(
    model_folder: Path, images: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(model_folder, images, "-o", tmp_path, "--method", method, "--json", tmp_path / "out.json") == 0
    assert capsys.readouterr().out == f"{tmp_path}: maps of 3 of 3 images\n"
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["label"] for row in found["images"]] == COLOURS
    assert all(row["explained"] == row["label"] and row["error"] is None for row in found["images"])
    # Files of one name in several folders are numbered.
    for label, name in enumerate(["a", "a-2", "a-3"]):
        patches = np.load(tmp_path / f"{name}.npy")
        assert patches.shape == (8, 8)
        top, left = coloured_square(label, seed=5000 + label)[1]
        row, column = np.unravel_index(patches.argmax(), patches.shape)
        assert top <= 4 * row < top + 8
        assert left <= 4 * column < left + 8
        values = np.asarray(Image.open(tmp_path / f"{name}.values.png"))
        assert (values.shape, values.dtype, values.max()) == ((32, 32), np.uint16, 65535)
        assert Image.open(tmp_path / f"{name}.png").format == "PNG"


def test_attention_also_shows_every_layer_and_head(model_folder: Path, images: Path, tmp_path: Path) -> None:
    # The folder need not exist, and the results may go into it.
    maps = tmp_path / "maps"
    arguments = ["-o", maps, "--method", "attention", "--json", maps / "b.json"]
    assert explain(model_folder, images / COLOURS[0], *arguments) == 0
    assert sorted(path.name for path in maps.iterdir()) == [
        "a.heads.png",
        "a.npy",
        "a.png",
        "a.values.png",
        "b.json",
        "index.html",
    ]


def test_keys_are_written_once(model_folder: Path, images: Path, tmp_path: Path) -> None:
    assert explain(model_folder, images, "-o", tmp_path, "--method", "keys") == 0
    with np.load(tmp_path / "keys.npz") as keys:
        assert {name: keys[name].shape for name in keys} == {f"layer {n}": (1, 16, 8, 8) for n in (0, 1)}
    assert (tmp_path / "keys.png").is_file()


def test_keys_never_replace_an_image(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "keys.png")
    before = (tmp_path / "keys.png").read_bytes()
    assert explain(model_folder, tmp_path / "keys.png", "-o", tmp_path, "--method", "keys") == 2
    assert "keys.png would replace a file that is read" in capsys.readouterr().err
    assert (tmp_path / "keys.png").read_bytes() == before


def test_deletion_compares_the_methods(
    model_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(model_folder, images, "-o", tmp_path, "--deletion", "--json", tmp_path / "out.json") == 0
    rows = json.loads((tmp_path / "out.json").read_text())["images"]
    mean = {
        method: {curve: np.mean([row["areas"][method][curve] for row in rows]) for curve in ("deletion", "insertion")}
        for method in rows[0]["areas"]
    }
    assert set(mean) == {"attention", "rollout", "relevance", "gradcam", "cam", "random"}
    for method in ("relevance", "gradcam", "cam"):
        assert mean[method]["deletion"] < mean["random"]["deletion"]
        assert mean[method]["insertion"] > mean["random"]["insertion"]
    assert f"{mean['gradcam']['deletion']:.4f}" in capsys.readouterr().out


def test_tiles_cover_a_large_image(model_folder: Path, tmp_path: Path) -> None:
    image = np.repeat(np.random.default_rng(0).integers(60, 110, (32, 88, 1), dtype=np.uint8), 3, axis=2)
    image[:, 56:], (top, left) = coloured_square(0, seed=7)
    Image.fromarray(image).save(tmp_path / "wide.png")
    arguments = ["--tile", "32", "--overlap", "4", "--class", COLOURS[0], "--method", "gradcam"]
    assert explain(model_folder, tmp_path / "wide.png", "-o", tmp_path / "maps", *arguments) == 0
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["index.html", "wide.png", "wide.values.png"]
    values = np.asarray(Image.open(tmp_path / "maps/wide.values.png"))
    assert values.shape == (32, 88)
    row, column = np.unravel_index(values.argmax(), values.shape)
    assert top <= row < top + 8
    assert 56 + left <= column < 56 + left + 8


def test_the_relevance_of_tiles_is_that_of_their_evidence(model_folder: Path) -> None:
    image = np.hstack([coloured_square(len(COLOURS), seed=1)[0], coloured_square(0, seed=2)[0]])
    # A trace of the class in the left tile, which has no square.
    image[8:16, 8:16, 2] += 4
    explainer = explain_module.Explainer(load_classifier(str(model_folder)), tiling=create_tiling(32, overlap=0))
    heat = explainer.explain(image, method="relevance", target=0).heat
    assert 0 < heat[:, :32].max() < 0.2 * heat[:, 32:].max()


def test_an_unreadable_image_is_named_and_the_rest_is_explained(
    model_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.png").touch()
    picture = images / COLOURS[0] / "a.png"
    assert explain(model_folder, tmp_path / "empty.png", picture, "-o", tmp_path / "maps") == 0
    assert "empty.png: is empty" in capsys.readouterr().err
    assert (tmp_path / "maps/a.npy").is_file()
    assert explain(model_folder, tmp_path / "empty.png", "-o", tmp_path / "maps") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--class", "yellow"], 1, "unknown class 'yellow'"),
        (["--class", "gren"], 1, "did you mean 'green'"),
        (["--class", "4"], 1, f"unknown class '4'; the classes are {', '.join(COLOURS)}"),
        (["--method", "rollout", "--class", "0"], 2, "--class is for --method relevance, gradcam and cam"),
        (["--model-kwargs", "pretrained=true"], 2, "--model-kwargs takes arguments of the model's class"),
        (["--overlap", "4"], 2, "--overlap needs --tile SIZE"),
        (["--tile", "32", "--deletion"], 2, "explain the model's own input: remove --tile"),
        (["--method", "rolout"], 2, "did you mean 'rollout'"),
    ],
)
def test_wrong_usage_is_one_sentence(
    model_folder: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    words: str,
) -> None:
    assert explain(model_folder, images, "-o", tmp_path / "maps", *arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_paths_that_do_not_exist_are_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(tmp_path / "no model", tmp_path / "gone.png", "-o", tmp_path / "maps") == 2
    assert "gone.png: there is no such file" in capsys.readouterr().err
    (tmp_path / "file").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert explain(tmp_path / "no model", tmp_path / "a.png", "-o", tmp_path / "file") == 2
    assert "cannot create the folder" in capsys.readouterr().err
    # Nor is an empty folder left when the model cannot be loaded.
    assert explain("linvit_no_such_model", tmp_path / "a.png", "-o", tmp_path / "new/maps") == 2
    assert "linvit_no_such_model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "maps/index.html").mkdir(parents=True)
    assert explain(tmp_path / "no model", tmp_path / "a.png", "-o", tmp_path / "maps") == 2
    assert "index.html is a folder" in capsys.readouterr().err
    (tmp_path / "maps/index.html").rmdir()
    page = ["--json", tmp_path / "maps/index.html"]
    assert explain(tmp_path / "no model", tmp_path / "a.png", "-o", tmp_path / "maps", *page) == 2
    assert "are both" in capsys.readouterr().err


def test_a_model_without_a_classifier_has_maps_of_no_class(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    save_for_hf(model, tmp_path / "model", model_args={"img_size": 32, "depth": 1}, safe_serialization=True)
    for flags, words in (
        (["--method", "relevance"], "method relevance explains a class: choose attention, rollout, keys"),
        (["--method", "rollout", "--deletion"], "--deletion explains a class"),
    ):
        assert explain(tmp_path / "model", images, "-o", tmp_path / "maps", *flags) in (1, 2)
        assert words in capsys.readouterr().err
    results = ["--json", tmp_path / "out.json"]
    assert explain(tmp_path / "model", images, "-o", tmp_path / "maps", "--method", "attention", *results) == 0
    first, *_ = json.loads((tmp_path / "out.json").read_text())["images"]
    assert (first["label"], first["probability"], first["explained"], first["error"]) == (None, None, None, None)
    html = (tmp_path / "maps/index.html").read_text()
    assert "<h2 hidden>Prediction</h2>" in html
    assert 'value="rollout"' in html
    assert 'value="gradcam"' not in html


def test_a_map_of_an_output_that_is_not_finite_is_an_error_of_the_image(
    model_folder: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    normalize = explain_module.normalize
    monkeypatch.setattr(explain_module, "normalize", lambda *arguments: normalize(*arguments) * np.nan)
    assert explain(model_folder, images / COLOURS[0], "-o", tmp_path / "maps") == 1
    assert "a.png: the model's output for this image is NaN or infinite" in capsys.readouterr().err
    assert list((tmp_path / "maps").iterdir()) == []
