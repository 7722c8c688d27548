"""A model file from a stranger runs no code, reads no other file and reaches no network."""

import pickle
import re
import shutil
import socket
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from linvit.cli import main
from linvit.data.augment.build import InputSpec
from linvit.runtimes.metadata import INPUT, KEY, OUTPUT, describe, parse_metadata
from linvit.runtimes.model import open_exported
from linvit.runtimes.torch_export import RECORD

onnx = pytest.importorskip("onnx", reason="needs pip install 'linvit[export]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'linvit[export]'")
openvino = pytest.importorskip("openvino", reason="needs pip install 'linvit[export]'")

METADATA = describe(
    architecture="tiny",
    num_classes=2,
    class_names=["cat", "dog"],
    spec=InputSpec((4, 6), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center"),
    with_preprocessing=False,
    precision="float32",
    versions={},
)

RECORD_TEXT = METADATA.to_json()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def fail(*arguments, **options):
        pytest.fail(f"reached the network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


def make_onnx(path, *, weight=None, size=(4, 6), outputs=2, record=RECORD_TEXT):
    """The mean of each channel times a matrix: (B, 3, H, W) to (B, outputs)."""
    weight = weight or onnx.numpy_helper.from_array(np.arange(3 * outputs, dtype=np.float32).reshape(3, -1), "weight")
    nodes = [
        onnx.helper.make_node("ReduceMean", [INPUT, "axes"], ["mean"], keepdims=0),
        onnx.helper.make_node("MatMul", ["mean", "weight"], [OUTPUT]),
    ]
    axes = onnx.numpy_helper.from_array(np.array([2, 3]), "axes")
    shapes = {INPUT: ["batch", 3, *size], OUTPUT: ["batch", outputs]}
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = onnx.helper.make_graph(nodes, "graph", ends[:1], ends[1:], [weight, axes])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    if record is not None:
        onnx.helper.set_model_props(model, {KEY: record})
    path.write_bytes(model.SerializeToString())
    return path


def external(location, *, is_marked=True):
    """A weight whose numbers lie in another file."""
    tensor = onnx.TensorProto(name="weight", data_type=onnx.TensorProto.FLOAT, dims=[3, 2])
    tensor.data_location = onnx.TensorProto.EXTERNAL if is_marked else onnx.TensorProto.DEFAULT
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_a_file_that_is_its_own_runs(tmp_path):
    found = open_exported(str(make_onnx(tmp_path / "m.onnx")), device="cpu")
    images = torch.rand(3, 3, 4, 6)
    expected = images.mean((2, 3)) @ torch.arange(6.0).reshape(3, 2)
    torch.testing.assert_close(found.model(images), expected)
    assert (found.class_names, found.model.num_classes) == (["cat", "dog"], 2)


def test_external_weights_may_only_lie_beside_the_file(tmp_path):
    numbers = np.ones(6, np.float32).tobytes()
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "secret", folder / "weights.data", folder / "sub/secret"):
        path.write_bytes(numbers)
    (folder / "link").symlink_to(tmp_path / "secret")
    open_exported(str(make_onnx(folder / "m.onnx", weight=external("weights.data"))), device="cpu")
    for location in ("../secret", str(tmp_path / "secret"), "link", "sub/secret", "/etc/hostname", "/dev/zero", "none"):
        for is_marked in (True, False):
            make_onnx(folder / "m.onnx", weight=external(location, is_marked=is_marked))
            with pytest.raises(ValueError, match=re.escape(f"keeps weights in '{location}': only files in its own")):
                open_exported(str(folder / "m.onnx"), device="cpu")


def test_external_weights_are_found_in_subgraphs(tmp_path):
    path = make_onnx(tmp_path / "m.onnx")
    model = onnx.load(path)
    branch = onnx.helper.make_graph([], "branch", [], [], [external("../secret")])
    model.graph.node.append(onnx.helper.make_node("If", ["condition"], ["x"], then_branch=branch, else_branch=branch))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="keeps weights in"):
        open_exported(str(path), device="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"record": None}, "only files that linvit export wrote"),
        ({"record": "{"}, "is not JSON"),
        ({"record": "[" * 100_000}, "is not JSON"),
        ({"record": METADATA.to_json().replace("[4,6]", "[4,-6]")}, "is wrong at img_size"),
        ({"record": METADATA.to_json().replace('"num_classes":2', '"num_classes":3')}, "names 2 classes, but has 3"),
        ({"size": (4, 7)}, "another input or output than its record says"),
        ({"outputs": 3}, "another input or output than its record says"),
    ],
)
def test_wrong_records_are_refused_in_one_sentence(changes, words, tmp_path, capsys):
    path = make_onnx(tmp_path / "m.onnx", **changes)
    (tmp_path / "x.png").write_bytes(b"")
    assert main(["predict", str(path), str(tmp_path / "x.png"), "--device", "cpu", "-j", "0"]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"\x08\x07junk", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["m.onnx", "m.pt2", "openvino_model.xml"])
def test_damaged_files_are_refused_in_one_sentence(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "openvino_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=name):
        open_exported(str(tmp_path / name), device="cpu", trust_code=True)


def test_openvino_reads_its_own_two_files_only(tmp_path):
    model = openvino.Core().read_model(make_onnx(tmp_path / "m.onnx"))
    model.set_rt_info(METADATA.to_json(), KEY)
    openvino.save_model(model, tmp_path / "ov/openvino_model.xml")
    found = open_exported(str(tmp_path / "ov"), device="cpu")
    assert found.model(torch.ones(1, 3, 4, 6)).shape == (1, 2)
    shutil.move(tmp_path / "ov/openvino_model.bin", tmp_path / "weights")
    (tmp_path / "ov/openvino_model.bin").symlink_to(tmp_path / "weights")
    with pytest.raises(ValueError, match="needs its weights in openvino_model"):
        open_exported(str(tmp_path / "ov"), device="cpu")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore")
def test_a_pt2_file_needs_trust_because_it_can_run_code(tmp_path):
    program = torch.export.export(nn.Flatten(), (torch.zeros(2, 3, 4, 6),))
    torch.export.save(program, tmp_path / "good.pt2", extra_files={RECORD: METADATA.to_json()})
    marker = tmp_path / "code-ran"
    with zipfile.ZipFile(tmp_path / "good.pt2") as good, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad:
        for name in good.namelist():
            is_pickle = "sample_inputs" in name
            bad.writestr(name, bomb(Bomb(marker)) if is_pickle else good.read(name))
    with pytest.raises(ValueError, match=r"can run code when it is opened.*--trust-code"):
        open_exported(str(tmp_path / "bad.pt2"), device="cpu")
    assert not marker.exists()
    # This is what the flag is for. (torch then fails to log what it did.)
    with suppress(TypeError):
        torch.export.load(tmp_path / "bad.pt2")
    assert marker.exists()


def bomb(value):
    path = value.path.with_name("bomb")
    torch.save((value,), path, pickle_module=pickle)
    return path.read_bytes()


def test_a_record_needs_no_more_than_its_fields():
    assert parse_metadata(METADATA.to_json()[:-1] + ',"later":1}', source="x") == METADATA
