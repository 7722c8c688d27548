"""What tells predictions of two runs apart: every weight, the paths in their order, the file of an exported model."""

from pathlib import Path

import pytest
import torch

from linvit.data.augment.build import InputSpec
from linvit.data.sources.base import PackedStrings
from linvit.model.build import create_model
from linvit.prediction.identity import Identity, identify
from linvit.prediction.predictor import Predictor
from linvit.runs.folder import Classifier
from linvit.runtimes.metadata import describe
from linvit.runtimes.model import ExportedModel

SPEC = InputSpec((32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "center")


def identity_of(classifier: Classifier, *paths: str) -> Identity:
    return identify(PackedStrings.pack(paths), classifier, Predictor(classifier))


def test_every_parameter_and_buffer_counts() -> None:
    settings = {"num_classes": 2, "img_size": 32, "embed_dim": 32, "depth": 1, "k": 4, "projection": "random"}
    model = create_model("linvit_mini_patch4_64", **settings).eval()
    classifier = Classifier(model, None, weights="a", settings={})
    before = identity_of(classifier, "a.png", "b.png")
    assert identity_of(classifier, "a.png", "b.png") == before
    # The same weights from another place, and the same images by another name.
    moved = identity_of(Classifier(model, None, weights="b", settings={}), "./a.png", f"{Path.cwd()}/b.png")
    assert before.changes(moved) == []
    assert before.changes(identity_of(classifier, "b.png", "a.png")) == ["other images"]
    assert before.changes(identity_of(classifier, "a.pngb.png", "")) == ["other images"]
    pooled = create_model("linvit_mini_patch4_64", **settings, global_pool="max").eval()
    pooled.load_state_dict(model.state_dict(), strict=False)
    other = Classifier(pooled, None, weights="a", settings={})
    assert before.changes(identity_of(other, "a.png", "b.png")) == ["other weights"]
    named = identity_of(Classifier(model, ["x", "y"], weights="a", settings={}), "a.png", "b.png")
    assert before.changes(named) == ["other class names"]
    tensors = [*model.parameters(), *model.buffers()]
    assert len(tensors) > 10
    for tensor in tensors:
        with torch.no_grad():
            kept = tensor.clone()
            tensor.view(-1)[-1] += 1
            assert before.changes(identity_of(classifier, "a.png", "b.png")) == ["other weights"]
            tensor.copy_(kept)
    assert identity_of(classifier, "a.png", "b.png") == before


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("model.onnx", ["model.onnx", "model.onnx.data"]),
        ("model.pt2", ["model.pt2"]),
        ("model.xml", ["model.xml", "model.bin"]),
        ("folder", ["folder/openvino_model.xml", "folder/openvino_model.bin"]),
    ],
)
def test_the_files_of_an_exported_model_count(name: str, files: list[str], tmp_path: Path) -> None:
    metadata = describe(
        architecture="linvit_mini_patch4_64",
        num_classes=2,
        class_names=None,
        spec=SPEC,
        with_preprocessing=False,
        precision="float32",
        versions={},
    )
    classifier = Classifier(
        ExportedModel(lambda batch: batch, metadata), None, weights=str(tmp_path / name), settings={}
    )
    (tmp_path / "folder").mkdir()
    for file in files:
        (tmp_path / file).write_bytes(b"old")
    (tmp_path / "unrelated.bin").write_bytes(b"old")
    before = identity_of(classifier, "a.png")
    (tmp_path / "unrelated.bin").write_bytes(b"new")
    assert identity_of(classifier, "a.png") == before
    for file in files:
        (tmp_path / file).write_bytes(b"new")
        assert before.changes(identity_of(classifier, "a.png")) == ["other weights"]
        (tmp_path / file).write_bytes(b"old")
