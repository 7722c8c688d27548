"""`examples/onnx_runtime.py` predicts what linvit predicts, without torch and linvit."""

import ast
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import linvit
from linvit.data.augment.build import InputSpec, build_eval_pipeline
from linvit.runtimes.metadata import KEY, ExportMetadata, describe

onnx = pytest.importorskip("onnx", reason="needs pip install 'linvit[export]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'linvit[export]'")

SCRIPT = Path(__file__).parents[2] / "examples" / "onnx_runtime.py"
SPEC = InputSpec((32, 24), (0.1, 0.2, 0.3), (0.3, 0.3, 0.4), "bicubic", 0.8, "center")
SPECS = {
    "center": SPEC,
    "square": replace(SPEC, size=(32, 32), crop_pct=0.9),
    "wide": replace(SPEC, crop_pct=1.5, interpolation="bilinear"),
    "squash": replace(SPEC, crop_mode="squash", interpolation="bilinear"),
    "nearest": replace(SPEC, interpolation="nearest"),
    "border": replace(SPEC, crop_mode="border", crop_pct=0.95, input_range=(100, 4095)),
}
# Input, what comes before and after the linear layer.
GRAPHS = {
    "normalized": ("float[batch, 3, 32, 24] images", "normalised = Identity (images)", "output = Identity (logits)"),
    "uint8": (
        "uint8[batch, 32, 24, 3] images",
        "moved = Transpose <perm = [0, 3, 1, 2]> (images)  pixels = Cast <to = 1> (moved) "
        "shares = Div (pixels, scale)  centred = Sub (shares, mean)  normalised = Div (centred, std)",
        "output = Softmax <axis = 1> (logits)",
    ),
}
CLASSES = ["red", "green", "blue"]


def record_of(spec: InputSpec, *, with_preprocessing: bool = False) -> ExportMetadata:
    return describe(
        architecture="linvit_mini_patch4_64",
        num_classes=3,
        class_names=CLASSES,
        spec=spec,
        with_preprocessing=with_preprocessing,
        precision="float32",
        versions={},
    )


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Smooth pictures as files of every kind that the script reads in its own way."""
    folder = tmp_path_factory.mktemp("photos")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
    picture = picture.resize((280, 200), Image.Resampling.BICUBIC)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    # Large enough to be decoded at a reduced size.
    picture.save(folder / "large.jpg", quality=95)
    picture.save(folder / "sideways.jpg", quality=95, exif=sideways)
    picture.resize((90, 17)).save(folder / "strip.png")
    picture.resize((3, 5)).save(folder / "tiny.png")
    picture.resize((41, 60)).convert("RGBA").save(folder / "alpha.png")
    picture.resize((40, 60)).quantize(64).save(folder / "palette.png")
    picture.resize((60, 43)).convert("L").save(folder / "grey.jpg", quality=95)
    sixteen = np.asarray(picture.resize((60, 43)).convert("L")).astype(np.uint16) * 17
    Image.fromarray(sixteen).save(folder / "sixteen.png")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A linear model of normalised images, and the same of pixels with its record: linvit exports such files."""
    folder = tmp_path_factory.mktemp("models")
    linear = "flat = Flatten (normalised)  logits = MatMul (flat, weight)"
    for name, (signature, before, after) in GRAPHS.items():
        model = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["" : 17]> linear ({signature}) => (float[batch, 3] output) '
            f"{{ {before} {linear} {after} }}"
        )
        weight = np.random.default_rng(1).normal(0, 0.03, (3 * 32 * 24, 3)).astype(np.float32)
        constants = {"weight": weight, "scale": np.float32(255), "mean": channels(SPEC.mean), "std": channels(SPEC.std)}
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(np.asarray(value), key)
            for key, value in constants.items()
            if f"{key})" in before + linear
        )
        record = record_of(SPEC, with_preprocessing=name == "uint8")
        onnx.helper.set_model_props(model, {KEY: record.to_json()})
        onnx.save(model, folder / f"{name}.onnx")
    return {path.stem: str(path) for path in folder.glob("*.onnx")}


def channels(values: tuple[float, ...]) -> np.ndarray:
    return np.array(values, np.float32)[:, None, None]


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


def test_it_needs_three_packages():
    imports = [
        node for node in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    modules = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    packages = {module.split(".")[0] for module in modules}
    assert packages - sys.stdlib_module_names == {"numpy", "onnxruntime", "PIL"}


@pytest.mark.parametrize("name", SPECS)
def test_images_are_prepared_as_in_evaluation(name, script, photos):
    record = json.loads(record_of(SPECS[name]).to_json())
    pipeline = build_eval_pipeline(SPECS[name])
    for path in photos:
        expected = pipeline.read(Path(path).read_bytes(), name=path)
        found = script["prepare"](path, record)
        assert found.shape == expected.shape
        # Decoders of JPEG files differ by a few grey levels, which averaging over pixels removes.
        is_sampled_jpeg = name == "nearest" and path.endswith(".jpg")
        assert np.abs(found.astype(int) - expected).max() <= (10 if is_sampled_jpeg else 2), path


@pytest.mark.parametrize("kind", ["normalized", "uint8"])
def test_predictions_equal_those_of_linvit(kind, models, photos, monkeypatch, capsys):
    assert run_script(monkeypatch, models[kind], *photos, "--topk", "3") == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    expected = list(linvit.Predictor(models[kind], device="cpu")(photos))
    assert len({prediction.labels[0] for prediction in expected}) > 1
    for row, prediction in zip(rows, expected, strict=True):
        assert (row[0], row[1]) == (prediction.path, prediction.labels[0])
        found = dict(zip(row[1::2], map(float, row[2::2])))
        assert found == pytest.approx(dict(zip(prediction.labels, prediction.probabilities)), abs=1e-2)


def test_what_it_cannot_use_is_a_sentence(models, photos, tmp_path, monkeypatch, capsys):
    nameless, damaged = tmp_path / "nameless.onnx", tmp_path / "damaged.onnx"
    model = onnx.load(models["uint8"])
    del model.metadata_props[:]
    onnx.save(model, nameless)
    damaged.write_bytes(b"no model")
    for path, reason in {
        nameless: "has no record of its classes and input; export the model with `linvit export`",
        damaged: "is not a model that ONNX Runtime can open",
        tmp_path / "none.onnx": "there is no such file",
    }.items():
        assert run_script(monkeypatch, str(path), photos[0]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith(f"error: {path}")
        assert reason in output.err
        assert output.err.count("\n") == 1

    # One bad image does not stop the others.
    assert run_script(monkeypatch, models["uint8"], str(damaged), photos[0]) == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {damaged} cannot be read")
    assert output.out.startswith(photos[0])
