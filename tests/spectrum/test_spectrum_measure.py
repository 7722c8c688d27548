"""Spectra of models against singular values of their textbook attention matrices, in double precision."""

import copy

import numpy as np
import pytest
import timm
import torch
from kinds import KIND_SHARES, REDUCING
from spectra import images, linformer_vit, textbook_matrices, timm_vit
from torch import nn

import linvit
from linvit.measure.timing import count_flops
from linvit.spectrum import measure


def expected_values(matrices):
    values = np.linalg.svd(matrices.numpy(), compute_uv=False)  # (B, L, H, T)
    return values.mean(0), (values**2).mean(0)


def assert_is_spectrum_of(spectrum, matrices):
    values, energies = expected_values(matrices)
    np.testing.assert_allclose(spectrum.singular_values, values, atol=1e-6)
    np.testing.assert_allclose(spectrum.energies, energies, atol=1e-6)
    np.testing.assert_allclose(spectrum.total_energies, matrices.square().sum((-1, -2)).mean(0), rtol=1e-9)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"qk_norm": True, "qkv_bias": False},
        {"class_token": False, "global_pool": "avg", "reg_tokens": 3},
        {"name": "vit_base_patch16_siglip_224"},
    ],
    ids=["plain", "qk_norm", "registers", "attention pooling"],
)
def test_timms_vits_match_the_textbook(arguments):
    model, pictures = timm_vit(**arguments), images()
    spectrum = linvit.attention_spectrum(model, pictures)
    assert_is_spectrum_of(spectrum, textbook_matrices(model, pictures))
    tokens = 35 + model.num_prefix_tokens
    assert spectrum.singular_values.shape == (2, 3, tokens)
    assert (spectrum.num_tokens, spectrum.num_patches, spectrum.grid_size) == (tokens, 35, (7, 5))
    assert (spectrum.num_images, spectrum.method, spectrum.embed_dim) == (2, "exact", 24)


MATRIX_KINDS = [pair for pair in KIND_SHARES if pair[0] not in (*REDUCING, "identity")]


@pytest.mark.parametrize(("kind", "share"), MATRIX_KINDS, ids=map("-".join, MATRIX_KINDS))
def test_our_models_are_weights_times_projection_of_values(kind, share):
    model, pictures = linformer_vit(projection=kind, share=share), images()
    spectrum = linvit.attention_spectrum(model, pictures)
    assert_is_spectrum_of(spectrum, textbook_matrices(model, pictures))
    # Six projected keys and the class token.
    assert (spectrum.singular_values[..., 7:] == 0).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"k": [6, None]},
        {"k": [[6, 4, 2], None], "share": "none"},
        {"class_token": False, "global_pool": "avg"},
        {"projection": "identity"},
        {"qk_norm": True},
    ],
    ids=["ordinary layers", "k per head", "no prefix", "identity", "qk_norm"],
)
def test_our_models_in_every_form(arguments):
    model, pictures = linformer_vit(**arguments), images()
    assert_is_spectrum_of(linvit.attention_spectrum(model, pictures), textbook_matrices(model, pictures))


@pytest.mark.parametrize("kind", REDUCING)
def test_projections_that_are_not_a_matrix_show_their_weights(kind):
    model = linformer_vit(projection=kind)
    spectrum = linvit.attention_spectrum(model, images())
    assert (spectrum.singular_values[..., :7] > 0).all()
    assert (spectrum.singular_values[..., 7:] == 0).all()
    # Seven columns whose rows sum to one.
    assert (spectrum.total_energies <= spectrum.num_tokens).all()
    assert (spectrum.total_energies >= spectrum.num_tokens / 7).all()


def test_queries_in_chunks_are_joined(monkeypatch):
    # Only kinds that reduce tokens form queries a chunk of tokens at a time.
    model = linformer_vit(projection="conv")
    at_once = linvit.attention_spectrum(model, images())
    monkeypatch.setattr("linvit.model.attention.CHUNK_ELEMENTS", 10 * 24)
    np.testing.assert_allclose(linvit.attention_spectrum(model, images()).energies, at_once.energies, atol=1e-9)


def test_known_attention_is_recognised():
    model = timm_vit()
    for block in model.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
    even = linvit.attention_spectrum(model, images())
    np.testing.assert_allclose(even.singular_values[..., 0], 1.0)
    np.testing.assert_allclose(even.singular_values[..., 1:], 0.0, atol=1e-7)
    assert (even.rank(0.99) == 1).all()


def test_random_projection_is_a_lower_bound_with_known_error():
    model, pictures = timm_vit(img_size=(56, 56)), images(1, (56, 56))
    exact = linvit.attention_spectrum(model, pictures)
    found = linvit.attention_spectrum(model, pictures, method="randomized", rank=24, seed=1)
    assert found.method == "randomized"
    assert found.singular_values.shape == (2, 3, 24)
    assert (found.singular_values <= exact.singular_values[..., :24] + 1e-9).all()
    np.testing.assert_allclose(found.singular_values, exact.singular_values[..., :24], rtol=0.05)
    np.testing.assert_allclose(found.total_energies, exact.total_energies)
    np.testing.assert_allclose(found.missing_energy, 1 - found.energies.sum(-1) / exact.total_energies)
    assert (found.cumulative_energy <= exact.cumulative_energy[..., :24] + 1e-9).all()
    assert (found.cumulative <= exact.cumulative[..., :24] + 1e-9).all()
    assert (found.rank(0.9) >= exact.rank(0.9)).all()
    assert (exact.missing_energy < 1e-9).all()


def test_auto_uses_random_projection_for_many_tokens(monkeypatch):
    model, pictures = timm_vit(), images(1)
    monkeypatch.setattr(measure, "MAX_EXACT_KEYS", 35)
    assert linvit.attention_spectrum(model, pictures, rank=5).method == "randomized"
    monkeypatch.setattr(measure, "MAX_EXACT_KEYS", 36)
    assert linvit.attention_spectrum(model, pictures, rank=5).method == "exact"


def test_the_model_is_restored():
    model = linformer_vit().train()
    model.blocks[0].eval()
    model.blocks[1].attn.order = "folded"
    model.blocks[1].attn.fused_attn = False
    before = copy.deepcopy(model)
    linvit.attention_spectrum(model, images())
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    for block, was in zip(model.blocks, before.blocks):
        assert (block.attn.order, block.attn.fused_attn) == (was.attn.order, was.attn.fused_attn)
        assert not block._forward_hooks
        assert not block._forward_pre_hooks


def test_every_matrix_is_reported():
    seen = []
    linvit.attention_spectrum(timm_vit(), images(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(1, 13)]


@pytest.mark.parametrize("make", [timm_vit, linformer_vit], ids=["timm's", "ours"])
def test_operations_besides_attention(make):
    # One hidden layer of 4 · 24 per block, and the embedding of 35 patches of 48 values.
    spectrum = linvit.attention_spectrum(make(), images(1))
    assert spectrum.flops_besides_attention == 2 * (2 * 2 * 36 * 24 * 96 + 35 * 48 * 24)


def test_operations_are_those_of_the_whole_model():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)
    spectrum = linvit.attention_spectrum(model, torch.randn(1, 3, 64, 64))
    whole = count_flops(copy.deepcopy(model).to("meta"), torch.empty(1, 3, 64, 64, device="meta"), mode="forward")
    attention = model.blocks[0].attn.to("meta")
    per_layer = count_flops(attention, torch.empty(1, 17, 192, device="meta"), mode="forward")
    assert spectrum.flops_besides_attention == whole - 2 * per_layer


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("resnet18", {}, "ResNet is not a Vision Transformer"),
        ("mobilenetv3_small_050", {}, "MobileNetV3 is not a Vision Transformer"),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 28, "window_size": 7},
            "SwinTransformer is not a Vision Transformer",
        ),
        ("samvit_base_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 2}, "windows"),
        ("xcit_nano_12_p16_224", {"img_size": 32}, "Xcit is not a Vision Transformer"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff", "img_size": 32, "depth": 1}, "attends 2 times"),
    ],
)
def test_attention_that_is_not_one_matrix_is_refused(name, arguments, words):
    model = timm.create_model(name, **arguments)
    size = arguments.get("img_size", 64)
    with pytest.raises(ValueError, match=words):
        linvit.attention_spectrum(model, torch.randn(1, 3, size, size))


def test_images_of_another_size_are_refused():
    model = linformer_vit(dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"14×10 patches: call set_input_size\(\)"):
        linvit.attention_spectrum(model, images(1, (56, 40)))
    with pytest.raises(ValueError, match="no images"):
        linvit.attention_spectrum(model, images(0))


def test_a_rotary_model_is_seen_after_its_rotation():
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_rope_224", img_size=32, depth=1, embed_dim=32, num_heads=2).eval()
    nn.init.normal_(model.blocks[0].attn.qkv.weight, std=0.5)
    picture = torch.randn(1, 3, 32, 32)
    fused = linvit.attention_spectrum(model, picture)
    seen = []
    model.blocks[0].attn.fused_attn = False
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda *call: seen.append(call[2].detach()))
    model(picture)
    values = np.linalg.svd(seen[0].numpy(), compute_uv=False)[0]
    np.testing.assert_allclose(fused.singular_values[0], values, atol=1e-5)
