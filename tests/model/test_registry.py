"""The registered models: each keeps timm's contract as far as it shows without running it, the smallest all of it."""

import functools
import re
import sys

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import VisionTransformer, save_for_hf
from timm.models._features_fx import create_feature_extractor
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver

from linvit.model import registry
from linvit.model.sharing import checkpoint_filter_fn
from linvit.model.vit import LinformerViT

NAMES = timm.list_models("linvit_*")
MINI = "linvit_mini_patch4_64"


@functools.cache
def on_meta(name: str) -> LinformerViT:
    return timm.create_model(name, device="meta")


def mini(**kwargs) -> LinformerViT:
    torch.manual_seed(0)
    return timm.create_model(MINI, **{"num_classes": 5, **kwargs}).eval()


def test_registered_names():
    expected = {f"linvit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
    expected |= {f"linvit_{size}_patch{p}" for size in ("tiny", "small", "base") for p in ("16_384", "8_224", "16_512")}
    expected |= {f"linvit_{size}_patch16_1024" for size in ("tiny", "small", "base")}
    expected |= {f"linvit_{name}" for name in ("small_patch16_2048", "small_patch14_518", "base_patch14_518")}
    expected |= {"linvit_mini_patch4_64", "linvit_mini_patch8_288"}
    assert set(NAMES) >= expected


@pytest.mark.parametrize("name", NAMES)
def test_configuration_and_docstring_match_the_model(name):
    model = on_meta(name)
    size, patch = int(name.rsplit("_", 1)[1]), int(re.search(r"patch(\d+)", name)[1])
    assert model.patch_embed.img_size == (size, size)
    assert model.patch_embed.patch_size == (patch, patch)
    assert resolve_model_data_config(model)["input_size"] == (3, size, size)
    projection = model.blocks[0].attn.key_projection
    doc = getattr(registry, name).__doc__
    assert f"{model.patch_embed.num_patches:,} patches, k={projection.k}, {projection.kind}, {model.share}." in doc
    state = model.state_dict()
    assert f"{model.pretrained_cfg['classifier']}.weight" in state
    assert f"{model.pretrained_cfg['first_conv']}.weight" in state
    assert model.num_features == model.head_hidden_size == model.embed_dim
    assert model.pretrained_cfg["fixed_input_size"]
    assert model.pretrained_cfg["pool_size"] is None


@pytest.mark.parametrize("name", NAMES)
def test_projections_cost_little(name):
    model = on_meta(name)
    projections = sum(value.numel() for key, value in model.named_parameters() if "projection" in key)
    backbone = sum(value.numel() for key, value in model.named_parameters() if not key.startswith("head."))
    assert projections <= 0.02 * (backbone - projections)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("linvit_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("linvit_small_patch8_224", "vit_small_patch8_224"),
        ("linvit_base_patch16_384", "vit_base_patch16_384"),
        ("linvit_large_patch16_224", "vit_large_patch16_224"),
        ("linvit_small_patch14_518", "vit_small_patch14_dinov2"),
        ("linvit_base_patch14_518", "vit_base_patch14_dinov2"),
    ],
)
def test_parameters_have_timms_names_and_shapes(ours, theirs):
    def shapes(name):
        state = timm.create_model(name, device="meta", num_classes=3).state_dict()
        return {key: tuple(value.shape) for key, value in state.items() if "projection" not in key}

    assert shapes(ours) == shapes(theirs)


def test_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="projections"):
        mini(projections="linear")


def test_every_parameter_gets_a_gradient():
    model = mini().train()
    model(torch.randn(2, 3, 64, 64)).mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_optimizer_groups():
    model = mini(projection="linear", share="none")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.75)
    decayed = {id(p) for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] > 0}
    for name, parameter in model.named_parameters():
        kept = parameter.ndim <= 1 or "projection" in name or name in ("cls_token", "pos_embed")
        assert (id(parameter) not in decayed) == kept, name
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) == 6
    assert max(scales) == 1.0


@pytest.mark.parametrize("share", ["none", "headwise", "kv", "layerwise"])
@pytest.mark.parametrize("change", ["same", "classes", "no head", "grey", "twice the size"])
def test_local_dir_round_trip(share, change, tmp_path):
    k = [[16, 9], None, [4, 4], [9, 4]] if share == "none" else [16, None, 16, 16]
    model = mini(share=share, k=k, projection="linear")
    save_for_hf(model, tmp_path, safe_serialization=True, model_config={"label_names": list("abcde")})
    kwargs = {
        "same": {},
        "classes": {"num_classes": 3},
        "no head": {"num_classes": 0},
        "grey": {"in_chans": 1},
        "twice the size": {"img_size": (128, 128)},
    }[change]
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **kwargs).eval()
    assert loaded.pretrained_cfg["label_names"] == list("abcde")
    assert [block.attn.key_projection is None for block in loaded.blocks] == [False, True, False, False]
    x = torch.randn(1, kwargs.get("in_chans", 3), *kwargs.get("img_size", (64, 64)))
    if change == "same":
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    elif change == "twice the size":
        model.set_input_size((128, 128))
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-5)
    else:
        assert loaded(x).shape == (1, kwargs.get("num_classes", 5) or model.embed_dim)


def test_save_after_changes_of_head_and_size(tmp_path):
    model = mini()
    model.reset_classifier(9, "avg")
    model.set_input_size((96, 64))
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_pretrained_loads_a_file_of_a_timm_vit(tmp_path):
    torch.manual_seed(1)
    theirs = VisionTransformer(img_size=64, patch_size=4, num_classes=7, **registry.MINI)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    overlay = {"file": str(tmp_path / "vit.pth"), "num_classes": 7}
    ours = mini(pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(ours.blocks[2].attn.qkv.weight, theirs.blocks[2].attn.qkv.weight)
    assert ours.head.weight.shape == (5, ours.embed_dim)


def test_training_checkpoint_of_timm(tmp_path):
    model = mini(share="layerwise")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path)).save_checkpoint(0, metric=1.0)
    loaded = mini(share="layerwise", checkpoint_path=str(tmp_path / "last.pth.tar"))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("new", [(128, 128), (64, 128), (32, 64)])
@pytest.mark.parametrize("share", ["none", "layerwise"])
def test_resizing_equals_building_and_loading_at_that_size(share, new):
    model = mini(share=share)
    built = mini(share=share, img_size=new)
    built.load_state_dict(checkpoint_filter_fn(model.state_dict(), built))
    model.set_input_size(new)
    x = torch.randn(1, 3, *new)
    torch.testing.assert_close(model(x), built(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", ["none", "layerwise"])
def test_traced_feature_extractor_owns_every_parameter(share):
    model = mini(share=share)
    extractor = create_feature_extractor(model, {"blocks.3": "last"})
    used = {key for key, _ in model.named_parameters() if not key.startswith(("head", "norm."))}
    assert {key for key, _ in extractor.named_parameters()} == used
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=1, intermediates_only=True, output_fmt="NLC")[0]
    torch.testing.assert_close(extractor(x)["last"][:, 1:], expected)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(drop_rate=0.1, drop_path_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, pos_drop_rate=0.1),
        dict(qk_norm=True, scale_attn_norm=True),
        dict(init_values=1e-4, global_pool="map"),
        dict(class_token=False, global_pool="avg", fc_norm=True, patch_drop_rate=0.5),
        dict(reg_tokens=4, no_embed_class=True, pre_norm=True),
        dict(dynamic_img_size=True, dynamic_img_pad=True),
        dict(weight_init="jax_nlhb", fix_init=True),
        dict(weight_init="moco", pos_embed="none", in_chans=1),
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
def test_keywords_of_timms_vit(kwargs):
    model = mini(**kwargs).train()
    size = (61, 90) if "dynamic_img_pad" in kwargs else (64, 64)
    out = model(torch.randn(2, kwargs.get("in_chans", 3), *size))
    out.mean().backward()
    assert out.shape == (2, 5)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_filter_is_in_the_modules_where_timm_looks_for_it():
    model, entrypoint = mini(), timm.model_entrypoint("linvit_mini_patch4_64")
    for name in (type(model).__module__, entrypoint.__module__):
        assert sys.modules[name].checkpoint_filter_fn is checkpoint_filter_fn
