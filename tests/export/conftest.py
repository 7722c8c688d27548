"""A classifier with settings of its own, the images it evaluates, and what it was exported to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import make_images

import linvit  # noqa: F401  registers the models
from linvit.cli import main
from linvit.data.augment.build import InputSpec
from linvit.export.write import write_onnx
from linvit.model.build import create_model
from linvit.runs.folder import save_classifier
from linvit.runtimes.metadata import KEY, ExportMetadata

CLASSES = ["green", "red", "=blue"]
SPEC = InputSpec((32, 24), (0.1, 0.2, 0.3), (0.3, 0.3, 0.4), "bilinear", 0.8, "border", (0, 4095))


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), classes=tuple(CLASSES), train=4, val=4)


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json and weights."""
    torch.manual_seed(0)
    model = create_model("linvit_mini_patch4_64", num_classes=3, img_size=SPEC.size, embed_dim=32, depth=1, k=4)
    with torch.no_grad():
        model.head.weight.mul_(200)
    folder = tmp_path_factory.mktemp("exported") / "model"
    save_classifier(folder, model.eval(), class_names=CLASSES, spec=SPEC, about={"version": "test"})
    return folder


@pytest.fixture(scope="package")
def onnx_exported_once() -> Iterator[None]:
    """Exporting to ONNX takes seconds: a graph that was exported before is copied, with the record of the new one."""
    import onnx

    files: dict[Any, bytes] = {}

    def write(program: Any, path: Path, metadata: ExportMetadata, *, opset: int) -> None:
        same = (metadata.architecture, metadata.input, opset, metadata.num_classes, metadata.heatmaps)
        if metadata.precision == "fp16" or metadata.img_size != SPEC.size or same not in files:
            write_onnx(program, path, metadata, opset=opset)
            files.setdefault(same, path.read_bytes())
            return
        model = onnx.load_from_string(files[same])
        onnx.helper.set_model_props(model, {KEY: metadata.to_json()})
        onnx.save(model, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linvit.export.write.write_onnx", write)
        yield


@pytest.fixture(scope="package")
def exported(
    folder: Path, data: Path, onnx_exported_once: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The model in every format, by name."""
    target = tmp_path_factory.mktemp("formats")
    formats = {
        "onnx": ["model.onnx"],
        "pixels": ["pixels.onnx", "--with-preprocessing", "--data-dir", str(data)],
        "openvino": ["ov", "--format", "openvino"],
        "torch-export": ["model.pt2"],
        "hf": ["hf", "--format", "hf"],
        "safetensors": ["model.safetensors"],
    }
    for name, *others in formats.values():
        assert main(["export", str(folder), "-o", str(target / name), "-j", "0", *others]) == 0
    return {kind: target / name for kind, (name, *_) in formats.items()}
