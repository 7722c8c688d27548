"""Key-padding masks on full models: padding changes nothing, or little."""

import pytest
import torch
from kinds import KINDS, REDUCING
from small_vits import images, make
from torch import nn

# 4 × 3 cells of 2 × 2 patches, and the same cells on a crop.
OPTIONS = dict(img_size=(32, 24), k=12, dtype=torch.float64)
CROPS = {(32, 16): 8, (16, 24): 6, (24, 16): 6}
# Rows of these kinds are zero outside their cell, so none reaches from a crop into the padding.
LOCAL = [("avgpool", "kv"), ("maxpool", "kv"), ("conv", "kv"), ("conv", "none"), ("separable", "headwise")]


def with_strong_weights(model):
    for name, parameter in model.named_parameters():
        if "projection" not in name and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def mask_of(grid, crop, prefix=1):
    seen = torch.zeros(grid, dtype=torch.bool)
    seen[: crop[0], : crop[1]] = True
    return nn.functional.pad(seen.flatten(), (prefix, 0), value=True)[None, None, None]


def weights_of_crop(model, crop):
    """The weights of `model` for a crop: the position embeddings of its patches, and the cells that lie in it."""
    state = model.state_dict()
    for name, value in crop.state_dict().items():
        if name == "pos_embed":
            prefix = model.num_prefix_tokens
            grid = state[name][:, prefix:].unflatten(1, model.patch_embed.grid_size)
            rows, columns = crop.patch_embed.grid_size
            state[name] = torch.cat([state[name][:, :prefix], grid[:, :rows, :columns].flatten(1, 2)], dim=1)
        elif name.endswith(("weight_h", "weight_w")):
            state[name] = state[name][:, : value.shape[1], : value.shape[2]]
    return state


@pytest.mark.parametrize("size", CROPS, ids=str)
@pytest.mark.parametrize(
    "prefix", [dict(), dict(class_token=False, global_pool="avg")], ids=["class token", "no prefix"]
)
@pytest.mark.parametrize(("kind", "share"), LOCAL)
def test_padding_of_whole_cells_changes_nothing(kind, share, prefix, size):
    options = {**OPTIONS, "projection": kind, "share": share, "projection_init": "average", **prefix}
    model = with_strong_weights(make(**options))
    crop = make(**{**options, "img_size": size, "k": CROPS[size]})
    crop.load_state_dict(weights_of_crop(model, crop))
    x = images((32, 24), dtype=torch.float64)
    patches, num_prefix = (size[0] // 4, size[1] // 4), model.num_prefix_tokens
    mask = mask_of((8, 6), patches, num_prefix)
    masked = model.forward_features(x, attn_mask=mask)[:, mask.flatten()]
    torch.testing.assert_close(masked, crop.forward_features(x[:, :, : size[0], : size[1]]), rtol=0, atol=1e-10)


def test_padding_that_cuts_cells_changes_little():
    """Compared with the model resized to the crop, where the cells are smaller."""
    model, resized = (make(projection="avgpool", img_size=(64, 64), pos_embed="none", k=16) for _ in range(2))
    resized.set_input_size(img_size=(44, 52))
    x = images((64, 64))
    masked = model.forward_features(x, attn_mask=mask_of((16, 16), (11, 13)))[:, 0]
    wanted = resized.forward_features(x[:, :, :44, :52])[:, 0]
    assert (masked - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("identity", *REDUCING)])
def test_random_masks_change_nothing_on_average(kind):
    """On average, keys rescaled from a random half of the patches equal the keys of all patches."""
    model = make(projection=kind, k=6)
    attention = model.blocks[0].attn
    x = torch.randn(1, 36, 24).expand(4000, -1, -1)
    mask = torch.rand(4000, 1, 1, 36) > 0.5
    mask[..., 0] = True
    projection, _ = attention.projections()
    reduced = []
    hook = attention.k_norm.register_forward_hook(lambda _, args, __: reduced.append(args[0]))
    with torch.no_grad():
        attention(x, attn_mask=mask)
        attention(x[:1])
    hook.remove()
    masked, whole = reduced
    size = whole[:, :, 1:].norm()
    assert projection.k == masked.shape[2] - 1
    assert (masked.mean(0, keepdim=True) - whole)[:, :, 1:].norm() < 0.1 * size
    assert (masked[:1] - whole)[:, :, 1:].norm() > 0.2 * size


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_a_fully_masked_image(kind, prefix):
    options = {} if prefix else dict(class_token=False, global_pool="avg")
    model = make(projection=kind, **options).train()
    mask = torch.ones(3, 1, 1, 35 + prefix, dtype=torch.bool)
    mask[0, ..., prefix:] = False
    mask[1] = False
    x = images(batch=3).requires_grad_()
    out = model.forward_features(x, attn_mask=mask)
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    for tensor in (x, *model.blocks.parameters()):
        assert torch.isfinite(tensor.grad).all()
    changed = x.detach().clone()
    changed[0] += torch.randn_like(changed[0])
    if prefix:
        torch.testing.assert_close(model.forward_features(changed, attn_mask=mask)[0, 0], out[0, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["separable", "linear", "maxpool", "dct"])
def test_masks_in_half_precision(kind, dtype):
    model = make(projection=kind)
    mask = torch.rand(2, 1, 1, 36) > 0.4
    expected = model.forward_features(images(), attn_mask=mask)
    with torch.autocast("cpu", dtype):
        found = model.forward_features(images(), attn_mask=mask)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)
    found = model.to(dtype).forward_features(images().to(dtype), attn_mask=mask)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)


class Masked(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, mask):
        return self.model.forward_features(x, attn_mask=mask)


@pytest.mark.parametrize("kind", ["separable", "maxpool"])
def test_masks_compile_and_export(kind):
    torch.compiler.reset()
    run = Masked(make(projection=kind, depth=1, dynamic_img_size=True))
    inputs = images((16, 36)), torch.rand(2, 1, 1, 37) > 0.4
    expected = run(*inputs)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), expected, rtol=0, atol=1e-5)
    exported = torch.export.export(run, inputs).module()
    torch.testing.assert_close(exported(*inputs), expected, rtol=0, atol=1e-5)
