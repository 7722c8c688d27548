"""LinformerViT: the reference's logits, sharing of E and F, timm's weights, gradient checkpointing."""

import pytest
import torch
from kinds import FIXED, KIND_SHARES, SHARES, reductions
from safetensors.torch import load_file, save_file
from small_vits import PER_LAYER, PREFIXES, TINY, images, kept_elements, make
from timm.layers import Mlp
from timm.models import VisionTransformer

from linvit import reference
from linvit.model.sharing import checkpoint_filter_fn


def reference_logits(model, x):
    """Logits from timm's blocks with the reference's attention."""

    def attention(layer, tokens):
        projections = layer.projections()
        n = tokens.shape[1] - model.num_prefix_tokens
        identity = [torch.eye(n, dtype=tokens.dtype)] * layer.num_heads
        E, F = (identity, identity) if projections is None else (reductions(p, layer.num_heads) for p in projections)
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


# With one k per head in every layer, share="none" also accepts kinds that are the same for all heads.
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
    assert "keep their initial values" in caplog.text


def test_shared_keys_reach_full_attention_as_k_grows():
    """With more keys, the class token of a converted ViT comes closer to the original, thanks to log(N/k)."""
    theirs = timm_vit()
    distances = []
    for k in (1, 6, 30):
        ours = make(projection="avgpool", k=k)
        ours.load_state_dict(theirs.state_dict())
        distances.append((ours.forward_features(images()) - theirs.forward_features(images()))[:, 0].norm().item())
    assert distances == sorted(distances, reverse=True)


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
