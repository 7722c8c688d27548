"""Heat maps equal those of dense T × T attention matrices, for every kind, sharing and pooling."""

import math

import pytest
import timm
import torch
from kinds import FIXED, REDUCING
from small_vits import PER_LAYER, PREFIXES, TINY, images, make
from timm.layers import apply_rot_embed_cat
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from linvit import attention_maps
from linvit.explanation.maps import METHODS, Explanation
from linvit.measure import attention as measured
from linvit.model.eva import LinformerEva
from linvit.model.registry import ROPE

KINDS = ["linear", "separable", "avgpool", "random", "dct"]
HEADS = 3


class Dense:
    """Runs a model with attention written out, and keeps each layer's P̄ (H, T, K) and F (H, K, T) in the graph."""

    def __init__(self, model, x):
        self.layers = []
        for block in model.blocks:
            block.attn.forward = self.forward_of(block.attn)
        placed = model._pos_embed(model.patch_embed(x))
        tokens, rope = placed if isinstance(placed, tuple) else (placed, None)
        self.tokens = model.norm_pre(tokens)
        for block in model.blocks:
            self.tokens = block(self.tokens) if rope is None else block(self.tokens, rope=rope)
        self.logits = model.forward_head(model.norm(self.tokens))
        for block in model.blocks:
            del block.attn.forward

    def forward_of(self, attention):
        def forward(x, rope=None, **_):
            q, k, v = attention.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            if rope is not None:
                prefix = attention.num_prefix_tokens
                q, k = (
                    torch.cat([y[:, :, :prefix], apply_rot_embed_cat(y[:, :, prefix:], rope, half=True)], dim=2)
                    for y in (q, k)
                )
            pair = attention.projections() if hasattr(attention, "projections") else None
            num_tokens = x.shape[1]
            bias = torch.zeros(num_tokens, dtype=x.dtype)
            if pair is None:
                E = F = torch.eye(num_tokens, dtype=x.dtype).expand(HEADS, -1, -1)
            else:
                prefix = attention.num_prefix_tokens
                E, F = (self.with_prefix(each, prefix) for each in pair)
                num_keys = pair[0].k
                bias = torch.zeros(HEADS, 1, prefix + num_keys, dtype=x.dtype)
                for head, length in enumerate(pair[0].lengths * (HEADS // len(pair[0].lengths))):
                    bias[head, :, prefix : prefix + length] = (
                        math.log(pair[0].matrix().shape[2] / length) if prefix else 0
                    )
                    bias[head, :, prefix + length :] = -math.inf
            scores = q @ (E @ k).mT / math.sqrt(q.shape[-1]) + bias
            P = scores.softmax(-1)
            P.requires_grad_() if not P.requires_grad else P.retain_grad()
            self.layers.append((P, F.detach()))
            return attention.proj((P @ (F @ v)).transpose(1, 2).flatten(2))

        return forward

    @staticmethod
    def with_prefix(projection, prefix):
        rows = projection.matrix().detach()
        full = torch.zeros(len(rows), prefix + rows.shape[1], prefix + rows.shape[2], dtype=rows.dtype)
        full[:, :prefix, :prefix] = torch.eye(prefix)
        full[:, prefix:, prefix:] = rows
        return full.expand(HEADS, -1, -1)

    def matrices(self):
        """A_h of each layer (H, T, T)."""
        return [P[0].detach() @ F for P, F in self.layers]


def start(model, num_tokens):
    """What the classifier reads: the class token, or the mean over patches."""
    v = torch.zeros(num_tokens, dtype=torch.float64)
    if model.global_pool == "token":
        v[0] = 1
    else:
        v[model.num_prefix_tokens :] = 1 / (num_tokens - model.num_prefix_tokens)
    return v


def on_grid(model, tokens):
    return tokens[..., model.num_prefix_tokens :].unflatten(-1, model.patch_embed.grid_size)


def small(**kwargs):
    model = make(dtype=torch.float64, **kwargs)
    for name, parameter in model.named_parameters():
        if "qkv" in name:
            nn.init.normal_(parameter, std=0.5)
    return model, images(batch=1, dtype=torch.float64)


def small_for(method):
    """A model that has maps of the method."""
    return small(**({"class_token": False, "global_pool": "avgmax"} if method == "cam" else {}))


CASES = [(kind, share) for kind in KINDS for share in PER_LAYER if kind not in FIXED or share in ("kv", "layerwise")]


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize(("kind", "share"), CASES)
def test_equals_dense_matrices(kind, share, prefix):
    model, x = small(projection=kind, share=share, k=PER_LAYER[share], **prefix)
    assert_equal_dense_matrices(model, x)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_rotary_models_equal_dense_matrices(pool):
    arguments = {**ROPE, "class_token": True, "num_reg_tokens": 2, "global_pool": pool, "dtype": torch.float64}
    model = LinformerEva(**{**TINY, "k": [6, None, 12]}, **arguments).eval()
    for name, parameter in model.named_parameters():
        if "qkv" in name or "head" in name:
            nn.init.normal_(parameter, std=0.5)
    assert_equal_dense_matrices(model, images(batch=1, dtype=torch.float64))


def assert_equal_dense_matrices(model, x):
    dense = Dense(model, x)
    A = dense.matrices()
    v = start(model, A[0].shape[-1])
    exact = dict(rtol=0, atol=1e-10)

    rows = torch.stack([v @ each for each in A])
    torch.testing.assert_close(attention_maps(model, x, method="attention").maps[0], on_grid(model, rows), **exact)

    product = torch.eye(len(v), dtype=torch.float64)
    for each in A:
        product = (torch.eye(len(v)) + each.mean(0)) / 2 @ product
    torch.testing.assert_close(attention_maps(model, x, method="rollout").maps[0], on_grid(model, v @ product), **exact)

    gradients = torch.autograd.grad(dense.logits[0, 3], [P for P, _ in dense.layers], retain_graph=True)
    if model.global_pool != "token":
        (gradient,) = torch.autograd.grad(dense.logits[0, 3], dense.tokens)
        v = (gradient * dense.tokens)[0].sum(1).clamp(min=0).detach()
    relevance = torch.eye(len(v), dtype=torch.float64)
    for (P, F), gradient in zip(dense.layers, gradients):
        relevance = relevance + ((P * gradient)[0].clamp(min=0) @ F).mean(0) @ relevance
    expected = on_grid(model, v @ relevance)
    found = attention_maps(model, x, method="relevance", classes=3)
    torch.testing.assert_close(found.maps[0], expected.detach(), **exact)
    assert found.classes.tolist() == [3]
    torch.testing.assert_close(found.logits, dense.logits.detach(), **exact)
    assert found.approximations == ()


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
def test_gradcam_weights_tokens_by_mean_gradients(prefix):
    model, x = small(**prefix)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    last = tokens
    if model.global_pool != "token":
        last = model.blocks[-1](tokens)
        logits = model.forward_head(model.norm(last))
    else:
        logits = model.forward_head(model.norm(model.blocks[-1](tokens)))
    (gradient,) = torch.autograd.grad(logits[0, 2], last)
    of_patches = slice(model.num_prefix_tokens, None)
    expected = (
        (last[0, of_patches] @ gradient[0, of_patches].mean(0)).clamp(min=0).unflatten(0, model.patch_embed.grid_size)
    )
    found = attention_maps(model, x, method="gradcam", classes=2).maps[0]
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)
    assert found.max() > 0


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_timms_own_vit(pool):
    torch.manual_seed(0)
    theirs = (
        VisionTransformer(
            img_size=(28, 20),
            patch_size=4,
            embed_dim=24,
            depth=3,
            num_heads=HEADS,
            num_classes=5,
            class_token=pool == "token",
            global_pool=pool,
        )
        .double()
        .eval()
    )
    ours = make(projection="identity", dtype=torch.float64, class_token=pool == "token", global_pool=pool)
    ours.load_state_dict(theirs.state_dict())
    x = images(dtype=torch.float64)
    for method in ("attention", "rollout", "relevance", "gradcam"):
        found = attention_maps(theirs, x, method=method)
        torch.testing.assert_close(found.maps, attention_maps(ours, x, method=method).maps)
        assert found.maps.shape[-2:] == (7, 5)


def test_rotary_models_of_timm():
    model = timm.create_model("vit_small_patch16_rope_224", img_size=64, depth=2, num_classes=4).eval()
    found = attention_maps(model, torch.randn(1, 3, 64, 64), method="relevance")
    assert found.maps.shape == (1, 4, 4)
    assert (found.maps > 0).any()


def test_patches_of_a_convolutional_network():
    model = timm.create_model("vit_tiny_r_s16_p8_224", num_classes=4).eval()
    maps = attention_maps(model, torch.randn(1, 3, 224, 224), method="relevance").maps
    assert maps.shape == (1, 7, 7)
    assert (maps > 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_the_rows_of_E(kind):
    model, x = small(projection=kind, share="kv", k=[6, None, 6])
    maps = attention_maps(model, x, method="keys").maps
    assert maps[1] is None
    E = model.blocks[2].attn.key_projection.matrix().detach()
    torch.testing.assert_close(maps[2], E.unflatten(2, (7, 5)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", REDUCING)
def test_kinds_that_are_no_matrix_count_cells_and_say_so(kind):
    model, x = small(projection=kind, share="kv")
    pooling, _ = small(projection="avgpool", share="kv")
    keys = attention_maps(model, x, method="keys")
    torch.testing.assert_close(keys.maps[0], attention_maps(pooling, x, method="keys").maps[0])
    assert keys.approximations == (f"{kind} does not weight patches linearly: each key counts as the mean of its cell",)
    assert torch.isfinite(attention_maps(model, x, method="relevance").maps).all()


def test_another_grid_than_the_models():
    model, _ = small(dynamic_img_size=True, share="headwise", projection="linear")
    fixed, _ = small(share="headwise", projection="linear")
    fixed.load_state_dict(model.state_dict())
    fixed.set_input_size((16, 36))
    fixed.pos_embed = model.pos_embed = None
    x = images((16, 36), dtype=torch.float64)
    for method in ("attention", "rollout", "relevance", "gradcam"):
        found = attention_maps(model, x, method=method).maps
        torch.testing.assert_close(found, attention_maps(fixed, x, method=method).maps)
        assert found.shape[-2:] == (4, 9)


def test_blocks_of_rows_give_the_same_maps(monkeypatch):
    model, x = small(class_token=False, global_pool="avg")
    before = {method: attention_maps(model, x, method=method).maps for method in ("attention", "rollout", "relevance")}
    monkeypatch.setattr(measured, "BLOCK_ENTRIES", 50)
    for method, maps in before.items():
        torch.testing.assert_close(attention_maps(model, x, method=method).maps, maps)


def test_images_are_explained_one_by_one_for_their_own_classes():
    model, _ = small()
    x = images(batch=3, dtype=torch.float64)
    together = attention_maps(model, x, classes=[1, 0, 4])
    for number, target in enumerate([1, 0, 4]):
        alone = attention_maps(model, x[number : number + 1], classes=target)
        torch.testing.assert_close(together.maps[number], alone.maps[0])
    assert attention_maps(model, x).classes.tolist() == model(x).argmax(1).tolist()


@pytest.mark.parametrize("enable", ["full", "mlp"])
@pytest.mark.parametrize("method", METHODS)
def test_models_in_training_and_callers_in_inference_mode_get_the_same_maps(method, enable):
    model, x = small_for(method)
    expected = attention_maps(model, x, method=method).maps
    model.set_grad_checkpointing(enable)
    with torch.inference_mode():
        found = attention_maps(model, x.clone(), method=method).maps
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert model.grad_checkpointing == (enable == "full")
    assert model.blocks[0].mlp.recompute == ("hidden" if enable == "mlp" else "activation")


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("method", METHODS)
def test_maps_are_computed_in_single_precision_under_autocast(method, prefix):
    # The norm before the pool has weights in single precision too.
    model = make(**prefix | (dict(global_pool="avg", fc_norm=False) if method == "cam" else {}))
    with torch.autocast("cpu", torch.bfloat16):
        seen = Explanation(model, images(batch=1), 3, with_gradients=True)
        found = seen.map(method)
    torch.testing.assert_close(found, seen.map(method), rtol=0, atol=0)
    assert all(each.dtype == torch.float32 for each in found)


@pytest.mark.parametrize("include_prefix", [False, True])
def test_the_start_is_the_models_pooling(include_prefix):
    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=24, depth=1, num_heads=3, reg_tokens=2, global_pool="avg",
        pool_include_prefix=include_prefix,
    )  # fmt: skip
    start = Explanation(model, torch.zeros(1, 3, 8, 8), None, with_gradients=False).start
    torch.testing.assert_close(model.pool(torch.eye(7)[None])[0], start)


def test_a_distilled_model_reads_two_tokens():
    model = VisionTransformerDistilled(img_size=8, patch_size=4, embed_dim=24, depth=1, num_heads=3).eval()
    start = Explanation(model, torch.zeros(1, 3, 8, 8), None, with_gradients=False).start
    model.head = model.head_dist = nn.Identity()
    torch.testing.assert_close(model.forward_head(torch.eye(6)[None])[0], start)


def test_a_model_that_returns_tokens_is_refused():
    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=24, depth=1, num_heads=3, global_pool="", fc_norm=False
    )
    with pytest.raises(ValueError, match=r"the model returns \(1, 5, 1000\), not a number per class"):
        attention_maps(model, torch.zeros(1, 3, 8, 8))


def test_the_model_is_left_as_it_was():
    model, x = small()
    model.requires_grad_(False).train()
    attention_maps(model, x, method="relevance")
    assert model.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            dict(method="rolout"),
            "unknown method 'rolout': choose one of 'attention', 'rollout'.*did you mean 'rollout'",
        ),
        (dict(classes=5), "class 5 does not exist: the model has 5 classes, from 0"),
        (dict(classes=-1), "class -1 does not exist"),
        (dict(classes=[1, 2]), "there are 2 classes for 1 images: give one, or one for each image"),
        (dict(classes=1, method="rollout"), "method 'rollout' does not explain a class: leave `classes` out"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    model, x = small()
    with pytest.raises(ValueError, match=words):
        attention_maps(model, x, **arguments)


def test_models_and_images_that_do_not_fit_are_refused():
    model, x = small(projection="identity")
    with pytest.raises(ValueError, match="only ordinary attention, so it has no projected keys"):
        attention_maps(model, x, method="keys")
    with pytest.raises(ValueError, match=r"with at least one image, not \(0, 3, 28, 20\)"):
        attention_maps(model, x[:0])
    with pytest.raises(ValueError, match="is not a Vision Transformer"):
        attention_maps(timm.create_model("resnet10t"), torch.zeros(1, 3, 64, 64))
