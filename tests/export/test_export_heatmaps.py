"""Heat maps of exported models: the same as the original's, from predict and explain, in every runtime."""

import json
import zipfile

import numpy as np
import pytest
import torch

from linvit.cli import main
from linvit.data.augment.build import InputSpec
from linvit.explanation import overlay
from linvit.export.graph import trace
from linvit.model.build import create_model
from linvit.runs.folder import save_classifier
from linvit.runtimes.metadata import HEATMAPS, describe
from linvit.runtimes.model import open_exported
from linvit.runtimes.torch_export import RECORD

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason="needs pip install 'linvit[export]'")

CLASSES = ["green", "red", "blue"]
SPEC = InputSpec((32, 24), (0.1, 0.2, 0.3), (0.3, 0.3, 0.4), "bilinear", 0.8, "border")
FILES = {"onnx": "m.onnx", "openvino": "ov", "torch-export": "m.pt2"}


def run(*arguments):
    return main([str(each) for each in arguments])


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    """A model whose classifier reads an average and a maximum over the patches."""
    torch.manual_seed(0)
    arguments = {"class_token": False, "global_pool": "avgmax", "embed_dim": 32, "depth": 1, "k": 4}
    model = create_model("linvit_mini_patch4_64", num_classes=3, img_size=SPEC.size, **arguments)
    with torch.no_grad():
        model.head.weight.mul_(20)
    folder = tmp_path_factory.mktemp("pooled") / "model"
    save_classifier(folder, model.eval(), class_names=CLASSES, spec=SPEC, about={})
    return folder


@pytest.fixture(scope="module")
def files(pooled, onnx_exported_once, tmp_path_factory):
    """The model in every runtime; the graph of the first two takes pixels."""
    folder = tmp_path_factory.mktemp("files")
    options = {"onnx": ["--with-preprocessing"], "openvino": ["--with-preprocessing"], "torch-export": []}
    for kind, name in FILES.items():
        results = ["--json", folder / f"{kind}.json", "--with-heatmap", *options[kind]]
        assert run("export", pooled, "-o", folder / name, "--format", kind, "-j", 0, *results) == 0
        (agreement,) = json.loads((folder / f"{kind}.json").read_text())["agreement"]
        assert agreement["heatmap"] < 1e-4
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The map and the title of each picture."""
    found = []
    monkeypatch.setattr(overlay, "save_overlay", lambda path, image, heat, title: found.append((heat, title)))
    monkeypatch.setattr("linvit.prediction.heatmaps.save_overlay", overlay.save_overlay)
    return found


@pytest.mark.parametrize("tiles", [[], ["--tile", "24", "--overlap", "4"]], ids=["full", "tiles"])
def test_predict_draws_the_maps_of_the_original(pooled, files, data, tmp_path, drawn, tiles):
    arguments = [
        data / "val/red/0.png",
        "-j",
        0,
        "--trust-code",
        "--device",
        "cpu",
        "--heatmap",
        tmp_path / "m",
        *tiles,
    ]
    assert run("predict", pooled, *arguments, "--heatmap-method", "cam") == 0
    for name in FILES.values():
        assert run("predict", files / name, *arguments) == 0
    (expected, title), *others = drawn
    assert "(cam for " in title
    assert np.nanmin(expected) < 0 < np.nanmax(expected)
    assert len(others) == 3
    for heat, other in others:
        np.testing.assert_allclose(heat, expected, rtol=0, atol=1e-4 * np.nanmax(expected))
        assert other == title


def test_explain_writes_maps_of_a_chosen_class_and_a_page(pooled, files, data, tmp_path):
    image = data / "val/red/1.png"
    for source, folder in ((pooled, "a"), (files / "m.onnx", "b")):
        options = ["-o", tmp_path / folder, "--class", "green", "--deletion", "--json", tmp_path / f"{folder}.json"]
        assert run("explain", source, image, "--method", "cam", *options) == 0
    np.testing.assert_allclose(np.load(tmp_path / "b/1.npy"), np.load(tmp_path / "a/1.npy"), atol=1e-5)
    one, other = (json.loads((tmp_path / f"{name}.json").read_text())["images"][0] for name in ("a", "b"))
    assert (other["label"], other["explained"]) == (one["label"], "green")
    assert other["areas"].keys() == {"cam", "random"}
    assert other["areas"]["cam"] == pytest.approx(one["areas"]["cam"], abs=1e-4)
    html = (tmp_path / "b/index.html").read_text()
    assert 'value="cam"' in html
    assert 'value="attention"' not in html


def test_maps_are_of_all_classes_and_add_up_to_the_logits(files):
    found = open_exported(str(files / "m.pt2"), device="cpu", trust_code=True).model
    assert found.metadata.output_shapes[HEATMAPS] == [3, 8, 6]
    logits, maps = found.class_maps(torch.randn(2, 3, *SPEC.size))
    rest = logits - maps.sum((2, 3))
    torch.testing.assert_close(rest[0], rest[1], rtol=0, atol=1e-4)


def test_buffers_of_the_graph_have_names_that_no_operation_has():
    """The ONNX exporter refuses them: the mean of the classifier's weights is folded into a constant `mean`."""
    arguments = {"class_token": False, "global_pool": "max", "embed_dim": 32, "depth": 1, "k": 4}
    model = create_model("linvit_mini_patch4_64", num_classes=3, img_size=SPEC.size, **arguments)
    metadata = describe(
        architecture="linvit_mini_patch4_64",
        num_classes=3,
        class_names=CLASSES,
        spec=SPEC,
        with_preprocessing=True,
        heatmaps=(8, 6),
        precision="float32",
        versions={},
    )
    program = trace(model.eval(), metadata)
    operations = {node.name for node in program.graph.nodes}
    assert "mean" in operations
    assert not operations & program.state_dict.keys()


def with_record(source, target, heatmaps):
    """Copy a `.pt2` file, with other heat maps in its record."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith(RECORD):
                content = json.dumps({**json.loads(content), "heatmaps": heatmaps}).encode()
            copy.writestr(name, content)
    return target


def test_files_without_maps_and_other_methods_are_refused(files, data, tmp_path, capsys):
    image = data / "val/red/0.png"
    bare = with_record(files / "m.pt2", tmp_path / "bare.pt2", None)
    wrong = with_record(files / "m.pt2", tmp_path / "wrong.pt2", [6, 8])
    for source, options, words in (
        (bare, [], "was exported without heat maps: export it with --with-heatmap"),
        (wrong, [], "has another output than its record says"),
        (files / "m.onnx", ["rollout"], "which has maps by method cam only, not rollout"),
    ):
        for command, folder, method in (("predict", "--heatmap", "--heatmap-method"), ("explain", "-o", "--method")):
            named = [method, *options] if options else []
            assert run(command, source, image, folder, tmp_path / "maps", "--trust-code", *named) == 1
            error = capsys.readouterr().err
            assert words in error
            assert error.count("\n") == 1


def test_a_model_that_reads_its_class_token_is_refused(folder, tmp_path, capsys):
    assert run("export", folder, "-o", tmp_path / "m.onnx", "--with-heatmap") == 1
    assert "pooling 'token' does not give them; train with --gp avg, max or avgmax" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
