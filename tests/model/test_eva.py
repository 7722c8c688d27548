"""LinformerEva: timm's rotary models with projected attention."""

import copy
import logging

import pytest
import timm
import torch
from kinds import KIND_SHARES
from timm.models.eva import Eva
from torch import nn

from linvit.model.eva import LinformerEva
from linvit.model.rotary import RotaryAttention
from linvit.model.sharing import checkpoint_filter_fn
from linvit.runs.weights import fit_weights, read_weights

SMALL = dict(img_size=(28, 20), patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5, attn_type="rope")
ROPE = dict(use_rot_pos_emb=True, use_abs_pos_emb=False, rope_type="dinov3", rope_rotate_half=True)
MIXED = dict(use_rot_pos_emb=True, rope_type="mixed", rope_rotate_half=False)


def make(cls=LinformerEva, **kwargs):
    torch.manual_seed(0)
    own = {"k": 6} if cls is LinformerEva else {}
    model = cls(**{**SMALL, **ROPE, **own, **kwargs}).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "projection" not in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def images(size=(28, 20)):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "kwargs",
    [{}, MIXED, dict(num_reg_tokens=4, init_values=1e-5), dict(attn_type="eva", qkv_fused=False, swiglu_mlp=True)],
    ids=["plain", "mixed", "registers", "split"],
)
@torch.no_grad()
def test_identity_is_timms_model(kwargs):
    model, theirs = make(projection="identity", **kwargs), make(Eva, **kwargs)
    theirs.load_state_dict(model.state_dict())
    assert torch.equal(model(images()), theirs(images()))
    for ours, expected in zip(model.forward_intermediates(images())[1], theirs.forward_intermediates(images())[1]):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("kind", "share"), KIND_SHARES)
def test_every_kind_and_sharing_trains(kind, share):
    model = make(projection=kind, share=share, k=6).train()
    model(images()).square().sum().backward()
    own = [name for name, parameter in model.named_parameters() if "projection" in name]
    assert all(dict(model.named_parameters())[name].grad.abs().sum() > 0 for name in own)
    assert set(own) <= model.no_weight_decay()


@pytest.mark.parametrize("rotary", [ROPE, MIXED], ids=["dinov3", "mixed"])
@pytest.mark.parametrize("how", ["load", "dynamic"])
@torch.no_grad()
def test_other_sizes_equal_set_input_size(rotary, how):
    model = make(share="headwise", projection="linear", **rotary)
    resized = copy.deepcopy(model)
    resized.set_input_size(img_size=(36, 24))
    other = make(share="headwise", projection="linear", **rotary, dynamic_img_size=how == "dynamic")
    if how == "load":
        other.set_input_size(img_size=(36, 24))
        other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    else:
        other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(images((36, 24))), resized(images((36, 24))), rtol=0, atol=1e-5)
    assert (model(images()) - resized(images((36, 24)))).abs().max() > 1e-3


@pytest.mark.parametrize("rotary", [ROPE, MIXED], ids=["dinov3", "mixed"])
def test_dropped_patches_keep_their_places(rotary):
    model = make(**rotary, patch_drop_rate=0.4).train()
    model.drop_patches.ordered = True
    torch.manual_seed(5)
    found = model.forward_features(images())
    assert found.shape[1] == 1 + 21
    # With a mask, dropped patches count as masked.
    torch.manual_seed(5)
    _, kept = model._drop_patches(model._pos_embed(model.patch_embed(images()))[0], model.drop_patches)
    present = torch.zeros(2, 36, dtype=torch.bool).scatter(1, kept + 1, True)
    present[:, 0] = True
    masked = copy.deepcopy(model)
    masked.drop_patches = None
    torch.manual_seed(5)
    expected = masked.forward_features(images(), attn_mask=present[:, None, None])
    torch.manual_seed(5)
    mask = torch.ones(2, 1, 1, 36, dtype=torch.bool)
    dropped = model.forward_features(images(), attn_mask=mask)
    index = torch.cat([torch.zeros(2, 1, dtype=torch.long), kept + 1], dim=1)[:, :, None].expand(-1, -1, 24)
    torch.testing.assert_close(dropped, expected.gather(1, index), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="patch dropout leaves tokens that do not fill a grid"):
        model.forward_intermediates(images())


@pytest.mark.parametrize("checkpointing", ["mlp", "full"])
def test_gradient_checkpointing_changes_nothing(checkpointing):
    model = make(local=3).train()
    plain = torch.autograd.grad(model(images()).square().sum(), list(model.parameters()), allow_unused=True)
    model.set_grad_checkpointing(checkpointing)
    again = torch.autograd.grad(model(images()).square().sum(), list(model.parameters()), allow_unused=True)
    for a, b in zip(plain, again):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_checkpoint_of_timm_loads_by_name(caplog):
    theirs = make(Eva)
    model = make(local=3)
    with caplog.at_level(logging.WARNING):
        state = checkpoint_filter_fn(theirs.state_dict(), model)
    assert "the checkpoint has no projections" in caplog.text
    model.load_state_dict(state)
    assert torch.equal(model.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)


def test_raw_weights_of_dinov3_load(tmp_path):
    model = timm.create_model(
        "linvit_mini_patch4_rope_64", depth=1, class_token=True, num_reg_tokens=4, init_values=0.1, attn_type="eva"
    )
    block = "blocks.0."
    raw = {
        "storage_tokens": torch.randn(1, 4, 64),
        "mask_token": torch.zeros(1, 64),
        "rope_embed.periods": torch.ones(8),
    }
    raw |= {f"{block}ls1.gamma": torch.randn(64), f"{block}ls2.gamma": torch.randn(64)}
    raw |= {f"{block}attn.qkv.bias": torch.randn(192), f"{block}attn.qkv.bias_mask": torch.ones(192)}
    renamed = ("reg_token", "gamma_1", "gamma_2", "q_bias", "v_bias", "projection")
    raw |= {name: value + 1 for name, value in model.state_dict().items() if not name.endswith(renamed)}
    torch.save({name: value for name, value in raw.items() if "projection" not in name}, tmp_path / "dinov3.pth")
    other = timm.create_model("linvit_mini_patch4_rope_64", depth=1, class_token=True)
    with pytest.raises(ValueError, match="set --model-kwargs num_reg_tokens=4"):
        fit_weights(other, read_weights(tmp_path / "dinov3.pth"))
    kept = fit_weights(model, read_weights(tmp_path / "dinov3.pth"))
    assert kept == [f"{block}attn.key_projection.weight_{axis}" for axis in "hw"]
    found = model.blocks[0]
    assert torch.equal(model.reg_token, raw["storage_tokens"])
    assert torch.equal(found.gamma_2, raw[f"{block}ls2.gamma"])
    assert torch.equal(found.attn.v_bias, raw[f"{block}attn.qkv.bias"][128:])
    assert torch.equal(found.mlp.fc1.weight, raw[f"{block}mlp.fc1.weight"])


@pytest.mark.parametrize(
    "kwargs",
    [{}, dict(MIXED, local=3), dict(share="none", k=[[6, 4, 9], None, [4, 4, 6]])],
    ids=["plain", "mixed", "per head"],
)
@torch.no_grad()
def test_torchscript_and_export(kwargs):
    model = make(**kwargs)
    expected = model(images())
    torch.testing.assert_close(torch.jit.script(model)(images()), expected, rtol=0, atol=1e-5)
    assert all(isinstance(block.attn, RotaryAttention) for block in model.blocks)
    exported = torch.export.export(model, (images(),))
    torch.testing.assert_close(exported.module()(images()), expected, rtol=0, atol=1e-5)


def test_training_options_of_timm_reach_the_rotary_model():
    model = timm.create_model("linvit_mini_patch4_rope_64", num_classes=3, local=3, k=[9, None, 4, 4])
    assert [pair and pair[0].k for pair in (block.attn.projections() for block in model.blocks)] == [9, None, 4, 4]
    assert model.blocks[0].attn.local is not None
    assert model.pos_embed is None
    with pytest.raises(ValueError, match="k=256 does not shorten a sequence of 256 patches"):
        timm.create_model("linvit_mini_patch4_rope_64", k=256)
