"""`linvit.convert_vit`: supported Vision Transformers convert exactly, and the others are refused."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock
from torch import nn
from vits import make_images, make_vit

import linvit
from linvit.conversion.convert import linformer_keywords, nearest_name, projected_lengths, use_ordinary_attention
from linvit.model.transformer import LinformerTransformer

# timm models that together cover every setting; overrides keep them small.
MODELS = {
    "augreg": ("vit_small_patch16_224", {}),
    "DeiT-III": ("deit3_small_patch16_224", {}),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {}),
    "CLIP": ("vit_base_patch32_clip_224", {}),
    "CLIP, quick GELU": ("vit_base_patch32_clip_quickgelu_224", {}),
    "SigLIP": ("vit_base_patch16_siglip_224", {}),
    "AIM v2": ("aimv2_large_patch14_224", {}),
    "packed SwiGLU": ("vit_giant_patch14_dinov2", {"embed_dim": 48, "mlp_ratio": 4.0}),
    "no class token": ("vit_medium_patch16_gap_256", {}),
    "one register": ("vit_base_patch14_reg1_tipsv2", {"num_classes": 0}),
    "all other settings": (
        "vit_small_patch16_224",
        dict(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, qkv_bias=False, proj_bias=False)
        | dict(global_pool="avg", fc_norm=False, pool_include_prefix=True, dynamic_img_size=True, pos_embed="none")
        | dict(img_size=(64, 48), mlp_ratio=2.7, drop_rate=0.1, drop_path_rate=0.2, act_layer="silu", in_chans=1),
    ),
}

MODELS |= {
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "DINOv3, with biases": ("vit_base_patch16_dinov3_qkvb", {}),
    "DINOv3, SwiGLU": ("vit_small_plus_patch16_dinov3", {}),
    "DINOv3, L": ("vit_large_patch16_dinov3", {}),
    "EVA-02, S": ("eva02_small_patch14_224", {}),
    "EVA-02, B": ("eva02_base_patch14_448", {}),
    "Perception Encoder, T": ("vit_pe_core_tiny_patch16_384", {"attn_pool_num_heads": 2}),
    "Perception Encoder, S": ("vit_pe_core_small_patch16_384", {"attn_pool_num_heads": 2}),
    "ROPE-ViT, mixed": ("vit_small_patch16_rope_mixed_ape_224", {}),
    "Sapiens2": ("vit_base_patch16_sapiens2", {"num_heads": 4, "num_kv_heads": [4, 2, 4], "img_size": (64, 48)}),
}


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_identity_gives_the_models_own_outputs(case):
    name, kwargs = MODELS[case]
    model = make_vit(name, **kwargs)
    converted = linvit.convert_vit(model, projection="identity")
    assert isinstance(converted, LinformerTransformer)
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size)
    torch.testing.assert_close(converted.forward_features(images), model.forward_features(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(converted(images), model(images), rtol=0, atol=1e-5)
    # With these random weights attention matters.
    pooled = linvit.convert_vit(model, k=4, projection="avgpool").forward_features(images)
    assert (pooled - model.forward_features(images)).abs().max() > 1e-2


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_timm_loads_a_saved_conversion(case, tmp_path):
    name, kwargs = MODELS[case]
    model = make_vit(name, **kwargs)
    converted = linvit.convert_vit(model, k=[6, None, 12])
    save_for_hf(converted, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size)
    assert torch.equal(again(images), converted(images))
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["model_args"]["k"] == [6, None, 12]
    assert settings["pretrained_cfg"]["mean"][0] == model.pretrained_cfg["mean"][0]


def test_dtype_mode_and_trained_weights_are_kept():
    model = make_vit(drop_path_rate=0.3).double().train()
    model.blocks[0].requires_grad_(False)
    model.set_grad_checkpointing()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted = linvit.convert_vit(model, k=9)
    assert next(converted.parameters()).dtype == torch.float64
    assert all(module.training for module in (*model.modules(), *converted.modules()))
    assert converted.grad_checkpointing
    assert converted.blocks[2].drop_path2.drop_prob == pytest.approx(0.3)
    assert not any(p.requires_grad for name, p in converted.blocks[0].named_parameters() if "projection" not in name)
    assert all(parameter.requires_grad for parameter in converted.blocks[1].parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_projections_start_at_averages():
    model = make_vit()
    pooled = linvit.convert_vit(model, k=16, projection="avgpool")
    images = make_images(2)
    for kind in ("separable", "linear"):
        for share in ("none", "headwise", "kv", "layerwise"):
            converted = linvit.convert_vit(model, k=16, projection=kind, share=share)
            torch.testing.assert_close(converted(images), pooled(images), rtol=0, atol=1e-5)


def test_the_global_random_state_is_unchanged():
    model = make_vit()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    linvit.convert_vit(model, k=9)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("eva02_enormous_patch14_clip_224", {"depth": 1}, "its blocks normalise after attention and MLP"),
        ("naflexvit_base_patch16_gap", {}, "it packs images of any grid into one batch"),
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer cannot be converted: it attends within windows"),
        ("samvit_base_patch16_224", {}, "VisionTransformerSAM cannot be converted: it attends within windows"),
        ("vit_relpos_small_patch16_224", {}, "VisionTransformerRelPos cannot be converted: its attention adds a bias"),
        (
            "beit_base_patch16_224",
            {},
            "Beit cannot be converted: its attention adds a bias for every pair of positions",
        ),
        ("deit_tiny_distilled_patch16_224", {}, "its distillation token has its own classifier"),
        ("resnet18", {}, "ResNet cannot be converted: only timm's VisionTransformer and Eva can be"),
        ("linvit_mini_patch4_64", {}, "LinformerViT cannot be converted: its attention is already projected"),
        ("vit_base_patch16_xp_224", {}, "a Vision Transformer with ParallelScalingBlock cannot be converted"),
        ("vit_small_patch16_224", {"block_fn": ParallelThingsBlock}, "several attention layers in parallel"),
        ("vit_small_patch16_224", {"block_fn": ResPostBlock}, "its blocks normalise after attention and MLP"),
        (
            "vit_small_patch16_224",
            {"attn_layer": "diff"},
            "a Vision Transformer with DiffAttention cannot be converted",
        ),
        ("vit_small_r26_s32_224", {}, "a Vision Transformer with HybridEmbed cannot be converted"),
    ],
)
def test_other_models_are_refused_by_name(name, kwargs, words):
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    with pytest.raises(ValueError, match=words):
        linvit.convert_vit(model, k=9)


@pytest.mark.parametrize("change", ["scale", "eps", "activation", "extra"])
def test_a_model_with_unknown_settings_is_refused(change):
    model = make_vit()
    if change == "scale":
        model.blocks[1].attn.scale *= 1.1
        model.blocks[1].attn.fused_attn = False
    elif change == "eps":
        model.blocks[2].norm2.eps = 0.1
    elif change == "activation":
        model.blocks[1].mlp.act = nn.ReLU()
    else:
        model.blocks[1].attn.extra = nn.Linear(2, 2)
    words = (
        "attn.extra.bias, blocks.1.attn.extra.weight have no" if change == "extra" else "even with ordinary attention"
    )
    with pytest.raises(ValueError, match=words):
        linvit.convert_vit(model, k=9)


def test_k_that_does_not_shorten_is_refused():
    with pytest.raises(ValueError, match="k=64 does not shorten a sequence of 64 patches"):
        linvit.convert_vit(make_vit(), k=64)


def test_layers_return_to_ordinary_attention_permanently(tmp_path):
    converted = linvit.convert_vit(make_vit(), k=9)
    use_ordinary_attention(converted, [1])
    assert projected_lengths(converted) == [9, None, 9]
    save_for_hf(converted, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = make_images(2)
    assert torch.equal(again(images), converted(images))


def test_lengths_per_head_are_read_back():
    converted = linvit.convert_vit(make_vit(), k=[[4, 6], None, [9, 9]], share="none")
    assert projected_lengths(converted) == [[4, 6], None, 9]


@pytest.mark.parametrize(
    ("patch_size", "embed_dim", "img_size", "name"),
    [
        (14, 384, [518, 518], "linvit_small_patch14_518"),
        (16, 768, [224, 224], "linvit_base_patch16_224"),
        (32, 768, [224, 224], "linvit_base_patch16_224"),
        ([16, 16], 1024, [384, 384], "linvit_large_patch16_224"),
        (14, 1536, [518, 518], "linvit_base_patch14_518"),
        (8, 200, [224, 200], "linvit_tiny_patch8_224"),
    ],
)
def test_the_nearest_registered_model(patch_size, embed_dim, img_size, name):
    assert nearest_name({"patch_size": patch_size, "embed_dim": embed_dim, "img_size": img_size}) == name


@pytest.mark.parametrize("width", [48, 4304, 1152, 100])
def test_the_ratio_gives_the_mlps_width(width):
    model = make_vit(embed_dim=36, num_heads=2, mlp_ratio=(width + 0.5) / 36)
    ratio = linformer_keywords(model)["mlp_ratio"]
    assert int(36 * ratio) == width


def test_public_name(tmp_path: Path):
    assert linvit.convert_vit is not None
    assert "convert_vit" in linvit.__all__
