"""LinformerViT: who owns E and F, every change of size, and the exactness of what is loaded."""

import copy
import io
import pickle

import pytest
import timm
import torch
from kinds import FIXED, KIND_SHARES, REDUCING, SHARES, reductions
from safetensors.torch import load_file, save_file
from timm.layers import Mlp
from timm.models import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn

from linvit import reference
from linvit.attention import LinformerAttention
from linvit.vit import LinformerViT, checkpoint_filter_fn

TINY = dict(img_size=(28, 20), patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5)
PER_LAYER = {
    "none": [[6, 4, 9], None, [4, 4, 6]],
    "headwise": [6, None, 12],
    "kv": [12, 6, None],
    "layerwise": [12, None, 12],
}
PREFIXES = {
    "class token": {},
    "no prefix": dict(class_token=False, global_pool="avg"),
    "class and 4 registers": dict(reg_tokens=4),
}


def make(**kwargs) -> LinformerViT:
    torch.manual_seed(0)
    return LinformerViT(**{**TINY, "k": 6, **kwargs}).eval()


def images(size=(28, 20), batch=2, **kwargs):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), **kwargs)


def reference_logits(model, x):
    """timm's block around the reference's attention, one layer after the other."""

    def attention(layer, tokens):
        projections = layer.projections()
        n = tokens.shape[1] - model.num_prefix_tokens
        whole = [torch.eye(n, dtype=tokens.dtype)] * layer.num_heads
        E, F = (whole, whole) if projections is None else (reductions(p, layer.num_heads) for p in projections)
        return reference.linformer_attention(
            tokens,
            qkv_weight=layer.qkv.weight,
            qkv_bias=layer.qkv.bias,
            out_weight=layer.proj.weight,
            out_bias=layer.proj.bias,
            E=E,
            F=F,
            num_prefix_tokens=model.num_prefix_tokens,
        )

    tokens = model._pos_embed(model.patch_embed(x))
    for block in model.blocks:
        tokens = tokens + attention(block.attn, block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.forward_head(model.norm(tokens))


# With one k per head in every layer, what is the same for all heads goes with share="none" too.
CASES = [(kind, share, k) for kind, share in KIND_SHARES for k in (12, PER_LAYER[share])]
CASES += [(kind, "none", [[6, 4, 9], None, [4, 4, 12]]) for kind in FIXED]


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize(("kind", "share", "k"), CASES, ids=str)
def test_equals_reference(kind, share, k, prefix):
    model = make(projection=kind, share=share, k=k, dtype=torch.float64, **prefix)
    x = images(dtype=torch.float64)
    fast, slow = model(x), reference_logits(model, x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    inputs = list(model.parameters())
    cotangent = torch.randn_like(slow)
    for a, b in zip(*(torch.autograd.grad(y, inputs, cotangent, retain_graph=True) for y in (fast, slow))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("share", "tensors"), [("none", 6), ("headwise", 6), ("kv", 3), ("layerwise", 1)])
def test_sharing_counts(share, tensors):
    model = make(projection="linear", share=share)
    names = [name for name, _ in model.named_parameters() if "projection" in name]
    assert len(names) == tensors
    assert names == [name for name in model.state_dict() if "projection" in name]
    maps = 3 if share == "none" else 1
    assert {tuple(model.state_dict()[name].shape) for name in names} == {(maps, 6, 7, 5)}
    assert model.no_weight_decay() >= set(names)


@pytest.mark.parametrize(("share", "tensors"), [("none", 6), ("headwise", 6), ("kv", 3), ("layerwise", 1)])
def test_random_matrices_are_saved_once_and_never_trained(share, tensors, tmp_path):
    model = make(projection="random", share=share)
    names = [name for name in model.state_dict() if "projection" in name]
    assert len(names) == tensors
    assert not any("projection" in name for name, _ in model.named_parameters())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = make(projection="random", share=share)
    for buffer in loaded.buffers():
        buffer.zero_()
    assert not torch.equal(loaded(images()), model(images()))
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    torch.testing.assert_close(loaded(images()), model(images()), rtol=0, atol=0)


def test_layer_without_projection_has_no_parameters_of_it():
    model = make(projection="linear", share="headwise", k=[6, None, 12])
    names = {name for name in model.state_dict() if "projection" in name}
    assert names == {f"blocks.{layer}.attn.{which}_projection.weight" for layer in (0, 2) for which in ("key", "value")}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(k=35), ValueError, "k=35 does not shorten a sequence of 35 patches"),
        (dict(k=[6, 6, 40]), ValueError, "k=40 does not shorten a sequence of 35 patches"),
        (dict(k=[6, 6]), ValueError, "names 2 layers, but the model has 3"),
        (dict(k=[6, 4, 6], share="layerwise"), ValueError, r"one k; got \[4, 6\]"),
        (dict(k=[[6, 4, 9], 6, 6], share="kv"), ValueError, "needs share='none'"),
        (dict(k=[[6, 4], 6, 6], share="none"), ValueError, "names 2 heads, but there are 3"),
        (dict(share="layer"), ValueError, "unknown share 'layer'"),
        (dict(projection="seperable"), ValueError, "did you mean 'separable'"),
        (dict(attn_layer="attn"), TypeError, "choose it by projection="),
        (dict(keys=3), TypeError, "keys"),
        *(
            (dict(projection=kind, share=share, k=k), ValueError, "use share='kv' or 'layerwise', or share='none' with")
            for kind in FIXED
            for share, k in (("headwise", 6), ("none", 6), ("none", [[6, 4, 9], 6, None]))
        ),
    ],
)
def test_refusals(kwargs, error, message):
    with pytest.raises(error, match=message):
        make(**kwargs)


@pytest.fixture
def fresh_compiler():
    """torch.compile gives up after eight versions of a function, and all models here share theirs."""
    torch.compiler.reset()


def timm_vit(**kwargs):
    torch.manual_seed(3)
    return VisionTransformer(**{**TINY, **kwargs}).eval()


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
def test_timm_weights_with_identity_give_timms_logits(prefix):
    theirs = timm_vit(**prefix)
    ours = make(projection="identity", **prefix)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", SHARES)
def test_timm_weights_with_linear_lack_only_E_and_F(share, caplog):
    ours = make(projection="linear", share=share)
    weights = timm_vit().state_dict()
    result = ours.load_state_dict(weights, strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) == {name for name in ours.state_dict() if "projection" in name}
    ours.load_state_dict(checkpoint_filter_fn(weights, ours), strict=True)
    assert "start fresh" in caplog.text


def test_shared_keys_reach_full_attention_as_k_grows():
    """The class token of a converted ViT comes closer to the original with more keys, and log(N/k) is why."""
    theirs = timm_vit()
    distances = []
    for k in (1, 6, 30):
        ours = make(projection="avgpool", k=k)
        ours.load_state_dict(theirs.state_dict())
        distances.append((ours.forward_features(images()) - theirs.forward_features(images()))[:, 0].norm().item())
    assert distances == sorted(distances, reverse=True)


# Where rows and columns follow from the shape of the grid, the picture has to keep its shape.
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

    def picture(height, width):
        return patches.repeat_interleave(height, 2).repeat_interleave(width, 3)

    expected = model(picture(4, 4))
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
    torch.testing.assert_close(larger(picture(4 * scale[0], 4 * scale[1])), expected, rtol=0, atol=1e-5)
    if how == "set_input_size":
        larger.set_input_size(img_size=(28, 20))
        for name, value in larger.state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-6, msg=name)


def kept_elements(model, x):
    """What the backward pass keeps, beside parameters and inputs."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [x, *model.parameters()]}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(found.values())


@pytest.mark.parametrize("mode", [True, "full", "mlp"])
@pytest.mark.parametrize("share", ["kv", "layerwise"])
def test_checkpointing_recomputes_the_same(mode, share):
    model = make(share=share, drop_path_rate=0.2).train()
    x = images()
    expected = step_gradients(model, x)
    plain = kept_elements(model, x)
    model.set_grad_checkpointing(mode)
    for name, gradient in step_gradients(model, x).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6, msg=name)
    assert kept_elements(model, x) < (0.75 if mode == "mlp" else 0.5) * plain
    model.set_grad_checkpointing(False)
    assert kept_elements(model, x) == plain


def step_gradients(model, x):
    torch.manual_seed(5)
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_refused_checkpointing():
    with pytest.raises(ValueError, match="unknown gradient checkpointing 'mpl'"):
        make().set_grad_checkpointing("mpl")
    with pytest.raises(ValueError, match="choose 'full'"):
        make(mlp_layer=Mlp).set_grad_checkpointing("mlp")


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
    # Two sizes in flight: each recomputation has to use its own grid.
    (model(images((36, 16))).sum() + model(x).sum()).backward()
    resized(x).sum().backward()
    alone = model.blocks[2].attn.key_projection.weight.grad.clone()
    assert torch.isfinite(alone).all()
    for index, features in enumerate(resized.forward_intermediates(x, intermediates_only=True)):
        torch.testing.assert_close(
            model.forward_intermediates(x, intermediates_only=True)[index], features, rtol=0, atol=1e-5
        )


def test_checkpointing_recomputes_on_the_right_grid():
    grads = []
    for checkpointing in (False, True):
        model = make(projection="linear", share="headwise", dynamic_img_size=True, dtype=torch.float64).train()
        model.set_grad_checkpointing(checkpointing)
        wide, tall = (model(images(size, dtype=torch.float64)).sum() for size in ((16, 36), (36, 16)))
        (wide + tall).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


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
    """Every kept subset tells the same when all patches are alike and E's rows are rescaled."""
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
def test_compile_export_and_precisions(share):
    model = make(projection="separable", share=share, depth=2)
    x = images()
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=0, atol=1e-5)
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
def test_other_kinds_compile_and_export(kind):
    model = make(projection=kind, depth=1, dynamic_img_size=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    x = images((16, 36))
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=0, atol=1e-5)


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
        with pytest.raises(ValueError, match=f"projection '{kind}' is none: use torch.compile or torch.export"):
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
