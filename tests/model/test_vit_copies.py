"""LinformerViT copied, compiled, exported, scripted and in other precisions."""

import copy
import io
import pickle

import pytest
import timm
import torch
from kinds import REDUCING, SHARES
from safetensors.torch import load_file, save_file
from small_vits import PER_LAYER, images, make
from timm.utils import ModelEmaV3
from torch import nn

from linvit.model.attention import LinformerAttention


@pytest.fixture
def fresh_compiler():
    """torch.compile gives up after eight versions of a function, and all models here share its versions."""
    torch.compiler.reset()


@pytest.mark.parametrize("share", SHARES)
def test_copies_share_what_the_original_shares(share, tmp_path):
    model = make(projection="linear", share=share)
    x = images()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = make(projection="linear", share=share)
    for parameter in loaded.parameters():
        nn.init.zeros_(parameter)
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    ema = ModelEmaV3(model, decay=0.0)
    ema.update(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        loaded,
        ema.module,
    ):
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
        assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if "projection" in name:
                    parameter.mul_(2)
        assert not torch.equal(twin(x), model(x))
        if share == "layerwise":
            assert len({id(block.attn.projections()[0]) for block in twin.blocks}) == 1


@pytest.mark.parametrize("share", SHARES)
def test_compile_and_precisions(share):
    model = make(projection="separable", share=share, depth=2 if share == "layerwise" else 1)
    x = images()
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), expected, rtol=0, atol=1e-5)
    assert all(isinstance(block.attn, LinformerAttention) for block in model.blocks)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.05)
        half = copy.deepcopy(model).to(dtype)
        torch.testing.assert_close(half(x.to(dtype)).float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["conv", "maxpool", "dct"])
def test_other_kinds_compile(kind):
    model = make(projection=kind, depth=1, dynamic_img_size=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    x = images((16, 36))
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "maxpool", "dct"])
def test_layerwise_models_export_in_operations_that_exporters_know(kind):
    """E shared by all layers makes torch.export wrap modules; neither that nor unequal cells may change the order."""
    model = make(projection=kind, share="layerwise", depth=2)
    exported = torch.export.export(model, (images(),))
    torch.testing.assert_close(exported.module()(images()), model(images()), rtol=0, atol=1e-5)
    called = {str(node.target) for node in exported.graph.nodes}
    assert not [name for name in called if "adaptive_max_pool" in name or "sort" in name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["conv", "maxpool", "dct", "random"])
def test_other_kinds_in_half_precision(kind, dtype):
    model = make(projection=kind)
    expected = model(images())
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(model(images()).float(), expected, rtol=0.1, atol=0.05)
    torch.testing.assert_close(model.to(dtype)(images().to(dtype)).float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("kind", ["random", "dct", *REDUCING])
def test_torchscript_takes_matrices(kind):
    model = make(projection=kind, depth=1)
    if kind in REDUCING:
        with pytest.raises(ValueError, match=f"projection '{kind}' is not one: use torch.compile or torch.export"):
            torch.jit.script(model)
    else:
        torch.testing.assert_close(torch.jit.script(model)(images()), model(images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["per_head", "associative", "folded"])
def test_compiled_training_step_has_eagers_gradients(order):
    gradients = []
    for compile_it in (False, True):
        model = make(projection="linear", share="headwise", depth=1, dtype=torch.float64).train()
        for block in model.blocks:
            block.attn.order = order
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compile_it else model
        run(images(dtype=torch.float64)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("share", SHARES)
def test_scripted_model_can_be_saved(share, tmp_path):
    model = make(projection="linear", share=share, k=PER_LAYER[share])
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(images()), model(images()), rtol=0, atol=1e-5)


def test_ties_survive_moving_between_dtypes_and_meta():
    model = make(share="layerwise", device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    assert torch.isfinite(model(images())).all()
    model.double()
    assert model.blocks[1].attn.projections()[0].weight_h.dtype == torch.float64


def test_features_only_and_pruning():
    model = timm.create_model("linvit_mini_patch4_64", features_only=True, out_indices=(0, 3))
    features = model(torch.randn(1, 3, 64, 64))
    assert [tuple(feature.shape) for feature in features] == [(1, 64, 16, 16)] * 2


def test_parallel_blocks_are_refused():
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(ValueError, match="one `attn_layer`"):
        make(block_fn=ParallelScalingBlock)
