"""The convolutional stem: its equation, its place in a model, and the shapes that it refuses."""

import json

import pytest
import timm
import torch
from small_vits import images, make
from tiny_runs import make_images, train
from torch import nn
from torch.nn import functional as F

from linvit.model.stem import ConvPatchEmbed
from linvit.model.vit import LinformerViT, checkpoint_filter_fn


def embedded(weights, x):
    """Convolutions of 3 × 3 with stride 2; between them, normalised channels of each position and a ReLU."""
    depth = len({name.split(".")[1] for name in weights})
    for index in range(depth):
        layer = {
            name: weights[f"proj.{index}.{name}"]
            for name in ("conv.weight", "conv.bias")
            if f"proj.{index}.{name}" in weights
        }
        x = F.conv2d(x, layer["conv.weight"], layer.get("conv.bias"), stride=2, padding=1)
        if index < depth - 1:
            centred = x - x.mean(dim=1, keepdim=True)
            x = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
            scale, shift = (weights[f"proj.{index}.bn.{name}"][:, None, None] for name in ("weight", "bias"))
            x = (scale * x + shift).relu()
    return x.flatten(2).mT


@pytest.mark.parametrize(("patch", "channels"), [(2, [24]), (4, [12, 24]), (8, [6, 12, 24]), (16, [3, 6, 12, 24])])
def test_equals_its_equation(patch, channels):
    stem = ConvPatchEmbed((2 * patch, 3 * patch), patch, 1, 24).double()
    for parameter in stem.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 1, 2 * patch, 3 * patch, dtype=torch.float64)
    weights = dict(stem.named_parameters())
    assert [weights[f"proj.{index}.conv.weight"].shape[0] for index in range(len(channels))] == channels
    torch.testing.assert_close(stem(x), embedded(weights, x), rtol=0, atol=1e-10)
    assert stem(x).shape == (2, 6, 24)


def test_a_model_has_it_before_its_positions():
    model = make(stem="conv")
    assert model.patch_embed.grid_size == (7, 5)
    weights = {name.removeprefix("patch_embed."): value for name, value in model.state_dict().items()}
    patches = embedded({name: value for name, value in weights.items() if name.startswith("proj.")}, images())
    plain = make()
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "patch_embed" not in name}, strict=False
    )
    plain.patch_embed.forward = lambda x: patches
    torch.testing.assert_close(model(images()), plain(images()))


def test_the_default_is_timms_patch_embedding():
    assert isinstance(make(stem="patch").patch_embed.proj, nn.Conv2d)
    torch.testing.assert_close(make(stem="patch")(images()), make()(images()), rtol=0, atol=0)


def test_a_dynamic_size_equals_set_input_size():
    dynamic, fixed = make(stem="conv", dynamic_img_size=True), make(stem="conv")
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size((16, 36))
    fixed.pos_embed = dynamic.pos_embed = None
    x = images((16, 36))
    torch.testing.assert_close(dynamic(x), fixed(x), rtol=0, atol=1e-5)


def test_scripts_and_compiles():
    model, x = make(stem="conv", depth=2), images()
    y = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), y)
    torch.testing.assert_close(torch.jit.script(model)(x), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patch_size": 14, "img_size": 28}, "square patches of 2, 4, 8, 16 or 32 pixels, not 14"),
        ({"patch_size": (4, 8), "img_size": 32}, r"square patches of 2, 4, 8, 16 or 32 pixels, not \(4, 8\)"),
        ({"patch_size": 64, "img_size": 640}, "not 64"),
        ({"patch_size": 16, "embed_dim": 12, "img_size": 64}, "needs a width that 8 divides"),
        ({"img_size": 30}, "image sides that are multiples of the patch's, 4, not 30"),
        ({"stem": "convs"}, "unknown stem 'convs': choose one of 'patch', 'conv'"),
    ],
)
def test_what_does_not_fit_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        make(**{"stem": "conv", **settings})


def test_the_patch_size_cannot_change():
    model = make(stem="conv")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="keeps its patches of 4 pixels"):
        model.set_input_size(patch_size=(2, 2))
    with pytest.raises(ValueError, match="multiples of the patch's, 4, not"):
        model.set_input_size((30, 20))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.set_input_size((32, 24), patch_size=(4, 4))
    assert model(images((32, 24))).shape == (2, 5)


def test_there_is_one_embedding_layer():
    with pytest.raises(TypeError, match="leave embed_layer= out"):
        LinformerViT(stem="conv", embed_layer=ConvPatchEmbed)


def test_a_run_trains_it_and_timm_loads_it(tmp_path, capsys):
    data = make_images(tmp_path / "data")
    assert train(data, tmp_path, stem="conv", epochs=1) == 0
    folder = tmp_path / "run/best"
    assert json.loads((folder / "config.json").read_text())["model_args"]["stem"] == "conv"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert isinstance(model.patch_embed, ConvPatchEmbed)
    assert train(data, tmp_path, "other", epochs=1, pretrained_path=str(folder / "model.safetensors")) == 1
    assert (
        "model.safetensors does not fit linvit_mini_patch4_64: it has a convolutional stem" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [("patch", "conv", "one matrix, .* leave stem out"), ("conv", "patch", "set stem='conv'")],
)
def test_weights_of_the_other_embedding_are_refused(theirs, ours, words):
    with pytest.raises(ValueError, match=words):
        checkpoint_filter_fn(make(stem=theirs).state_dict(), make(stem=ours))
