"""`linvit export`: what it writes, checks, refuses, and leaves when it fails; eval and predict on exported models."""

import csv
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import linvit
from linvit.cli import main
from linvit.evaluation.inference import fingerprint, input_spec
from linvit.export import write
from linvit.runs.folder import load_classifier
from linvit.runtimes.metadata import KEY, need
from linvit.runtimes.model import is_exported, open_exported

onnx = pytest.importorskip("onnx", reason="needs pip install 'linvit[export]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install 'linvit[export]'")
for package in ("onnxscript", "openvino"):
    pytest.importorskip(package, reason="needs pip install 'linvit[export]'")

GRAPHS = ["onnx", "pixels", "openvino", "torch-export"]
FORMATS = [*GRAPHS, "hf", "safetensors"]


def run(*arguments, capsys=None):
    status = main([str(each) for each in arguments])
    return status if capsys is None else (status, capsys.readouterr().err)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def evaluate(data, tmp_path_factory):
    """The rows and the report of an evaluation."""

    def evaluate(source, *options):
        folder = tmp_path_factory.mktemp("eval")
        files = ["--csv", folder / "rows.csv", "--json", folder / "report.json"]
        assert run("eval", source, data, "-j", 0, "--bootstrap", 0, "--trust-code", *files, *options) == 0
        return rows(folder / "rows.csv"), json.loads((folder / "report.json").read_text())

    return evaluate


@pytest.fixture(scope="module")
def predict(data, tmp_path_factory):
    def predict(source, *options):
        path = tmp_path_factory.mktemp("predict") / "rows.csv"
        assert run("predict", source, data / "val", "-j", 0, "--trust-code", "-o", path, *options) == 0
        return rows(path)

    return predict


@pytest.fixture(scope="module")
def expected(folder, evaluate, predict):
    tiles = ["--tile", "24", "--merge", "max"]
    return {"eval": evaluate(folder), "predict": predict(folder), "tiles": predict(folder, *tiles)}


@pytest.mark.parametrize("kind", FORMATS)
def test_eval_gives_the_rows_and_figures_of_the_original(kind, exported, evaluate, expected):
    found, report = evaluate(exported[kind])
    right, original = expected["eval"]
    assert len({row["prediction"] for row in right}) > 1
    for row, other in zip(found, right, strict=True):
        assert [row[name] for name in ("path", "label", "prediction")] == [
            other[name] for name in ("path", "label", "prediction")
        ]
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=1e-4)
    for name in ("top1", "top5", "macro_f1", "img_size", "num_classes", "model", "labels"):
        assert report[name] == original[name], name
    assert report["loss"] == pytest.approx(original["loss"], abs=1e-4)


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("tiled", [False, True], ids=["full", "tiles"])
def test_predict_gives_the_rows_of_the_original(kind, tiled, exported, predict, expected):
    found = predict(exported[kind], *(["--tile", "24", "--merge", "max"] if tiled else []))
    for row, other in zip(found, expected["tiles" if tiled else "predict"], strict=True):
        assert (row["path"], row["label_1"], row["error"]) == (other["path"], other["label_1"], "")
        for rank in ("probability_1", "probability_3"):
            assert float(row[rank]) == pytest.approx(float(other[rank]), abs=1e-4)


def test_the_predictor_takes_exported_models(exported, folder):
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    (expected,) = linvit.Predictor(folder, device="cpu")(image)
    (found,) = linvit.Predictor(exported["onnx"], device="cpu")(image)
    assert found.labels == expected.labels
    with pytest.raises(ValueError, match="whose precision is fixed"):
        linvit.Predictor(exported["onnx"], device="cpu", amp=True)
    with pytest.raises(ValueError, match="can run code"):
        linvit.Predictor(exported["torch-export"], device="cpu")


def test_the_onnx_file_alone_is_enough(exported, folder):
    """Its record says how to prepare images, and with --with-preprocessing pixels are enough."""
    record = json.loads({each.key: each.value for each in onnx.load(exported["onnx"]).metadata_props}[KEY])
    assert record["class_names"] == ["green", "red", "=blue"]
    assert (record["img_size"], record["interpolation"], record["crop_mode"]) == ([32, 24], "bilinear", "border")
    assert (record["mean"], record["input_range"]) == ([0.1, 0.2, 0.3], [0, 4095])
    assert record["versions"]["torch"] == torch.__version__
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 24, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(exported["pixels"])
    (probabilities,) = session.run(None, {"images": pixels})
    mean, std = (np.array(record[name], np.float32) for name in ("mean", "std"))
    images = torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = load_classifier(str(folder)).model(images).softmax(1).detach().numpy()
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "half"), [("torch-export", "bf16"), ("safetensors", "fp16"), ("openvino", "fp16")])
def test_half_precision_is_smaller_and_nearly_the_same(kind, half, exported, folder, tmp_path, evaluate, expected):
    name = tmp_path / exported[kind].name
    assert run("export", folder, "-o", name, "--format", kind, "--half", half, "-j", 0) == 0
    sizes = [
        sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.bin")))
        for path in (name, exported[kind])
    ]
    assert sizes[0] < 0.95 * sizes[1]
    assert evaluate(name)[1]["loss"] == pytest.approx(expected["eval"][1]["loss"], abs=0.05)


def test_int8_reports_its_accuracy_beside_the_float_models(folder, data, tmp_path, exported, onnx_exported_once):
    path, report = tmp_path / "int8.onnx", tmp_path / "report.json"
    arguments = ["export", folder, "--data-dir", data, "--int8", "-j", 0, "--max-drop", 50]
    assert run(*arguments, "-o", path, "--json", report) == 0
    found = json.loads(report.read_text())
    record, original = (open_exported(str(each)).model.metadata for each in (path, exported["onnx"]))
    # Sets of classes that were calibrated on the original do not hold for it.
    assert record.weights != original.weights
    assert found["accuracy"].keys() == {"num_images", "float", "int8"}
    assert found["accuracy"]["num_images"] == 12
    graph = onnx.load(path).graph
    assert {tensor.data_type for tensor in graph.initializer} >= {onnx.TensorProto.INT8}
    # Weights became integers, and the outputs moved, but little.
    assert found["bytes"] < exported["onnx"].stat().st_size
    assert 1e-5 < found["agreement"][1]["difference"] < 0.2


def test_a_file_that_differs_is_not_kept(folder, tmp_path, monkeypatch, capsys):
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"earlier")
    opened = write.open_written
    monkeypatch.setattr(write, "open_written", lambda path, options: lambda x: opened(path, options)(x) * 1.1)
    status, error = run("export", folder, "-o", target, capsys=capsys)
    assert status == 1
    assert "differs from the original by" in error
    assert "nothing was written" in error
    assert target.read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "m.bin"], "choose --format, or a name in .onnx, .pt2 or .safetensors"),
        (["-o", "m.pt2", "--format", "onnx"], "must end in .onnx"),
        (["-o", "m.onnx", "--half", "bf16"], "use --half fp16"),
        (["-o", "m.pt2", "--int8", "--data-dir", "."], "--int8 is for onnx and openvino"),
        (["-o", "m.onnx", "--int8"], "--int8 needs --data-dir"),
        (["-o", "m", "--format", "hf", "--with-preprocessing"], "needs a graph"),
        (["-o", "m", "--format", "hf", "--with-heatmap"], "needs a graph"),
        (["-o", "m.onnx", "--aot-inductor"], "--aot-inductor is for torch-export"),
        (["-o", "m.onnx", "--amp"], "use --half"),
        (["-o", "nowhere/m.onnx"], "create it first"),
    ],
)
def test_wrong_usage(arguments, words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, error = run("export", folder, *arguments, capsys=capsys)
    assert (status, error.count("\n")) == (2, 1)
    assert words in error
    assert not list(tmp_path.iterdir())


def test_the_folder_of_the_source_is_not_overwritten(folder, capsys):
    status, error = run("export", folder, "-o", folder, "--format", "hf", capsys=capsys)
    assert (status, "choose another folder" in error) == (2, True)


def test_a_missing_package_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    status, error = run("export", folder, "-o", tmp_path / "m.onnx", capsys=capsys)
    assert (status, error) == (
        1,
        "error: --format onnx needs the package onnxscript: pip install 'linvit[export]'\n",
    )
    with pytest.raises(ValueError, match=r"needs the package onnxscript: pip install 'linvit\[export\]'"):
        need("onnxscript", "x")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--img-size", "64"], "takes images of 32×24 px only"),
        (["--model", "x"], "--model: "),
        (["--amp"], "--amp: "),
        (["--use-ema"], "--use-ema: "),
        (["--device", "meta"], "--device"),
    ],
)
def test_options_that_an_exported_model_has_fixed_are_refused(options, words, exported, data, capsys):
    status, error = run("predict", exported["openvino"], data / "val", *options, capsys=capsys)
    assert status in (1, 2)
    assert words in error
    assert error.count("\n") == 1


def test_normalisation_inside_the_file_cannot_be_replaced(exported, data, capsys):
    status, error = run("eval", exported["pixels"], data, "--mean", "0.5", capsys=capsys)
    assert (status, "normalises images itself" in error) == (1, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data-dir", "nowhere"], "nowhere: no such folder"),
        (["--data-dir", "DATA", "--split", "test"], "no split 'test'"),
        (["--data-dir", "DATA", "--int8", "--calibration-split", "test"], "no split 'test'"),
        (["--images", "bad"], "bad/0.png: is empty"),
    ],
)
def test_images_are_checked_before_the_model_is_loaded(options, words, folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("linvit.evaluation.inference.open_source", lambda options: pytest.fail("loaded"))
    Path("bad").mkdir()
    Path("bad/0.png").touch()
    named = [data if each == "DATA" else each for each in options]
    status, error = run("export", folder, "-o", "m.onnx", *named, capsys=capsys)
    assert (status, error.count("\n")) == (1, 1)
    assert words in error


def test_rules_for_sets_of_classes_hold_for_exported_models(folder, exported):
    found = set()
    for source in (folder, *exported.values()):
        is_graph = is_exported(str(source))
        classifier = open_exported(str(source), trust_code=True) if is_graph else load_classifier(str(source))
        found.add(fingerprint(classifier, input_spec(classifier)))
    assert len(found) == 1
    assert None not in found


def test_a_second_export_is_refused(exported, tmp_path, capsys):
    status, error = run("export", exported["onnx"], "-o", tmp_path / "m.pt2", capsys=capsys)
    assert (status, "is an exported model already" in error) == (1, True)


def test_the_hf_folder_loads_in_timm_and_has_a_card(exported):
    import timm

    model = timm.create_model(f"local-dir:{exported['hf']}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["green", "red", "=blue"]
    card = (exported["hf"] / "README.md").read_text()
    for words in ("library_name: timm", "timm.create_model(", "linvit.Predictor(", "onnxruntime", "limits"):
        assert words in card


def test_the_grey_image_of_a_camera_needs_only_the_file(exported, tmp_path, capsys):
    Image.fromarray(np.full((50, 40), 2000, np.uint16)).save(tmp_path / "grey.png")
    assert run("predict", exported["onnx"], tmp_path / "grey.png", "-j", 0) == 0
    assert len(capsys.readouterr().out.strip().split("\t")) >= 6


@pytest.mark.parametrize("name", ["onnx", "pixels"])
def test_the_example_without_torch_predicts_the_same(name, exported, data, predict):
    script = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "onnx_runtime.py"))
    session, record = script["open_model"](str(exported[name]))
    for row in predict(exported[name]):
        image = script["prepare"](row["path"], record)
        (probabilities,) = script["predict"](session, record, image[None])
        expected = [float(row[f"probability_{rank}"]) for rank in (1, 2, 3)]
        assert sorted(probabilities, reverse=True) == pytest.approx(expected, abs=1e-2)
        assert record["class_names"][probabilities.argmax()] == row["label_1"].removeprefix("'")
