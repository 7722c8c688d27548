"""LinformerViT at other sizes: resized, loaded and chosen per batch; dropped and masked patches."""

import copy

import pytest
import torch
from kinds import KIND_SHARES, SHARES
from small_vits import images, make
from torch import nn

from linvit.model.sharing import checkpoint_filter_fn

# If rows and columns follow from the shape of the grid, the image must keep its shape.
SCALES = [(kind, share, (2, 2)) for kind, share in KIND_SHARES if kind != "identity"]
SCALES += [(kind, share, (2, 3)) for kind, share in KIND_SHARES if kind in ("linear", "separable", "random")]


@pytest.mark.parametrize(("kind", "share", "scale"), SCALES, ids=str)
@pytest.mark.parametrize("how", ["set_input_size", "load", "dynamic_img_size"])
def test_image_constant_on_its_patches_at_a_larger_size(kind, share, scale, how):
    options = dict(projection=kind, share=share, pos_embed="none", class_token=False, global_pool="avg")
    model = make(**options)
    for name, parameter in model.named_parameters():
        if "projection" in name:
            nn.init.normal_(parameter, std=0.3)
    patches = torch.randn(2, 3, 7, 5)

    def image(height, width):
        return patches.repeat_interleave(height, 2).repeat_interleave(width, 3)

    expected = model(image(4, 4))
    size = (28 * scale[0], 20 * scale[1])
    if how == "set_input_size":
        larger = copy.deepcopy(model)
        larger.set_input_size(img_size=size)
    elif how == "load":
        larger = make(**options, img_size=size)
        larger.load_state_dict(checkpoint_filter_fn(model.state_dict(), larger))
    else:
        larger = make(**options, dynamic_img_size=True)
        larger.load_state_dict(model.state_dict())
    torch.testing.assert_close(larger(image(4 * scale[0], 4 * scale[1])), expected, rtol=0, atol=1e-5)
    if how == "set_input_size":
        larger.set_input_size(img_size=(28, 20))
        for name, value in larger.state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dynamic_size_equals_set_input_size(checkpointing):
    model = make(projection="linear", share="headwise", dynamic_img_size=True)
    resized = make(projection="linear", share="headwise")
    resized.set_input_size(img_size=(16, 36))
    resized.pos_embed = None
    model.pos_embed = None
    model.set_grad_checkpointing(checkpointing)
    x = images((16, 36))
    torch.testing.assert_close(model(x), resized(x), rtol=0, atol=1e-5)
    model.train()
    resized.train()
    # With two sizes in one backward pass, each recomputation must use its own grid.
    (model(images((36, 16))).sum() + model(x).sum()).backward()
    resized(x).sum().backward()
    alone = model.blocks[2].attn.key_projection.weight.grad.clone()
    assert torch.isfinite(alone).all()
    for index, features in enumerate(resized.forward_intermediates(x, intermediates_only=True)):
        torch.testing.assert_close(
            model.forward_intermediates(x, intermediates_only=True)[index], features, rtol=0, atol=1e-5
        )


def test_checkpoint_brings_its_rows_and_columns():
    """Trained on 8 × 8 patches as 4 × 4 cells; a model built for 4 × 16 patches has 2 × 8 of its own."""
    options = dict(k=16, projection="separable", share="kv", pos_embed="none", class_token=False, global_pool="avg")
    trained = make(**options, img_size=(32, 32))
    state = trained.state_dict()
    loaded = make(**options, img_size=(16, 64))
    assert loaded.blocks[0].attn.key_projection.weight_h.shape == (1, 2, 4)
    loaded.requires_grad_(False)
    loaded.load_state_dict(checkpoint_filter_fn(state, loaded), strict=True)
    assert loaded.blocks[0].attn.key_projection.weight_h.shape == (1, 4, 4)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trained.set_input_size(img_size=(16, 64))
    trained.requires_grad_(False)
    torch.testing.assert_close(loaded(images((16, 64))), trained(images((16, 64))), rtol=0, atol=0)
    narrow = make(**options, img_size=(8, 128))
    with pytest.raises(ValueError, match="as 4×4 cells does not fit a 2×32 patch grid"):
        checkpoint_filter_fn(state, narrow)


@pytest.mark.parametrize("share", SHARES)
def test_checkpoint_brings_its_kernels(share):
    options = dict(projection="conv", share=share, pos_embed="none", class_token=False, global_pool="avg")
    trained = make(**options)
    loaded = make(**options, img_size=(44, 36))
    own, theirs = (model.blocks[0].attn.key_projection.weight.shape for model in (loaded, trained))
    assert own[2:] != theirs[2:]
    loaded.load_state_dict(checkpoint_filter_fn(trained.state_dict(), loaded), strict=True)
    trained.set_input_size(img_size=(44, 36))
    torch.testing.assert_close(loaded(images((44, 36))), trained(images((44, 36))), rtol=0, atol=0)
    assert {name for name, _ in loaded.named_parameters() if "projection" in name} <= loaded.no_weight_decay()


@pytest.mark.parametrize("size", [(28, 20), (16, 36)])
@pytest.mark.parametrize(("kind", "share"), KIND_SHARES)
def test_trains_saves_and_changes_size(kind, share, size):
    options = dict(projection=kind, share=share, k=6, dynamic_img_size=True)
    model = make(**options).train()
    model(images(size)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    twin = make(**options)
    for tensor in (*twin.parameters(), *twin.buffers()):
        nn.init.zeros_(tensor)
    twin.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(twin(images(size)), model(images(size)), rtol=0, atol=0)
    # The position embedding is resampled in single precision either way.
    twin.set_input_size(img_size=size)
    torch.testing.assert_close(twin(images(size)), model(images(size)), rtol=0, atol=1e-5)


def test_resize_refuses_before_it_changes_anything():
    model = make(k=9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="k=9 does not shorten a sequence of 6 patches"):
        model.set_input_size(img_size=(12, 8))
    assert model.patch_embed.img_size == (28, 20)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_patch_dropout_trains_and_is_off_in_evaluation():
    model = make(projection="linear", patch_drop_rate=0.4, share="none")
    x = images()
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    model.train()
    seen = []
    hook = model.blocks[0].attn.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    first, second = model(x), model(x)
    hook.remove()
    assert seen == [22, 22]
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_patch_dropout_of_a_constant_image_changes_nothing():
    """If all patches are equal, every kept subset gives the same result, because the rows of E are rescaled."""
    model = make(projection="avgpool", k=1, patch_drop_rate=0.4, pos_embed="none", class_token=False, global_pool="avg")
    x = torch.ones(2, 3, 28, 20)
    expected = model(x)
    torch.testing.assert_close(model.train()(x), expected, rtol=0, atol=1e-5)


def test_key_padding_mask_hides_patches():
    model = make(projection="linear")
    mask = torch.ones(2, 1, 1, 36, dtype=torch.bool)
    x = images()
    torch.testing.assert_close(model(x, attn_mask=mask), model(x), rtol=0, atol=1e-5)
    mask[:, :, :, 20:] = False
    changed = x.clone()
    changed[:, :, 16:] += torch.randn_like(changed[:, :, 16:])
    hidden = [model.forward_features(y, attn_mask=mask)[:, :17] for y in (x, changed)]
    torch.testing.assert_close(*hidden, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="cannot be causal"):
        model(x, is_causal=True)
