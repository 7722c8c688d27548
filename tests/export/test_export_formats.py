"""What exports: every kind of projection, with each sharing, layout and size, to every runtime."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from kinds import KINDS, SHARES
from torch import nn

from linvit.data.augment.build import InputSpec
from linvit.export.check import compare, random_images, require
from linvit.export.graph import trace
from linvit.export.write import write_onnx, write_openvino, write_torch_export
from linvit.model.build import create_model
from linvit.runtimes.metadata import describe
from linvit.runtimes.model import open_exported

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason="needs pip install 'linvit[export]'")

# kind → sharing, (height, width) in pixels, and arguments of the model. Patches have 4 px.
TABLE = {
    "linear": ("layerwise", (24, 32), {"class_token": False, "global_pool": "avgmax", "depth": 2}),
    "separable": ("none", (32, 24), {"k": ((3, 6),), "reg_tokens": 2}),
    "conv": ("layerwise", (24, 24), {"local": 3, "stem": "conv"}),
    "avgpool": ("kv", (20, 28), {"k": 6}),
    "maxpool": ("layerwise", (20, 28), {"k": 6}),
    "random": ("headwise", (32, 32), {"qk_norm": True, "mlp_layer": "swiglu"}),
    "dct": ("kv", (24, 36), {"dynamic_img_size": True}),
    "identity": ("kv", (24, 24), {"pos_embed": "none", "init_values": 0.1}),
}


SPEC = InputSpec((24, 24), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
METADATA = describe(
    architecture="linvit_mini_patch4_64",
    num_classes=5,
    class_names=None,
    spec=SPEC,
    with_preprocessing=False,
    precision="float32",
    versions={},
)


def test_the_table_has_every_kind_and_sharing():
    assert TABLE.keys() == KINDS.keys()
    assert {share for share, _, _ in TABLE.values()} == set(SHARES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TABLE)
def test_every_kind_exports_to_every_runtime(kind, tmp_path):
    share, size, arguments = TABLE[kind]
    torch.manual_seed(0)
    defaults = {"depth": 1, "embed_dim": 32, "num_heads": 2, "k": 4, "projection": kind, "share": share}
    model = create_model("linvit_mini_patch4_64", num_classes=5, img_size=size, **{**defaults, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Layer scale, `local` and biases start at zero, or nearly so.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    spec = replace(SPEC, size=size)
    metadata = METADATA.model_copy(update={"img_size": size})
    program = trace(model, metadata)
    write_torch_export(program, tmp_path / "model.pt2", metadata, compiled=False)
    write_onnx(program, tmp_path / "model.onnx", metadata, opset=20)
    (tmp_path / "ov").mkdir()
    write_openvino(tmp_path / "model.onnx", tmp_path / "ov", metadata)
    with torch.no_grad():
        assert model(next(random_images(spec, seed=0))).std() > 0.1
    for name in ("model.pt2", "model.onnx", "ov"):
        found = open_exported(str(tmp_path / name), device="cpu", trust_code=True)
        agreement = compare(model, found.model, random_images(spec, seed=0), images="random")
        assert agreement.difference < 1e-5, name
        assert agreement.num_images == 8


class Sorting(nn.Module):
    def forward(self, x):
        return x.flatten(1).sort(stable=True).values[:, :5]


def test_a_refusal_names_the_model_and_the_operation(tmp_path):
    metadata = METADATA.model_copy(update={"img_size": (4, 4), "architecture": "sorting"})
    program = trace(Sorting(), metadata)
    with pytest.raises(ValueError, match=r"^the ONNX exporter cannot take sorting: .*aten\.sort") as error:
        write_onnx(program, tmp_path / "m.onnx", metadata, opset=20)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_nan_and_differences_do_not_pass():
    images = [torch.zeros(2, 3, 4, 4)]
    right = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    off = compare(lambda x: right, lambda x: right + torch.tensor([[0.0, 0.0], [2.0, 0.0]]), images, images="x")
    assert (off.num_images, off.top1) == (2, 0.5)
    assert off.difference == pytest.approx(np.exp(2) / (np.exp(2) + np.e) - 1 / (1 + np.e), rel=1e-5)
    broken = compare(
        lambda x: right, lambda x: right * torch.tensor([[torch.nan], [1.0]]), [*images, *images], images="x"
    )
    assert np.isnan(broken.difference)


def test_heat_maps_that_differ_do_not_pass():
    logits, maps = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.ones(2, 2, 2, 2)
    # Half of the map of the first image's class is elsewhere; the other class does not count.
    moved = maps.clone()
    moved[0, 1], moved[1, 1] = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), 9
    found = compare(lambda x: (logits, maps), lambda x: (logits, moved), [torch.zeros(2, 3, 4, 4)], images="x")
    assert (found.difference, found.heatmap) == (0, 0.5)
    with pytest.raises(ValueError, match="heat maps of the exported model differ from the original's by 50 % on x"):
        require(found, precision="float32", tolerance=None)
    require(found, precision="bf16", tolerance=None)
