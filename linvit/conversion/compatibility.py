"""Which timm Vision Transformers can be converted, and which keywords build the matching LinformerViT.

timm keeps only some of the keywords that built a model, and its classifier and size may have changed since. So the
keywords are read from the model's modules. All values can be written as JSON, because a converted model is saved with
them.
"""

from typing import Any

from timm.layers import Attention, GluMlp, LayerScale, Mlp, PatchEmbed, SwiGLU, get_act_layer
from timm.layers import get_norm_layer as norm_class
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import nn

from linvit.model.mlp import LeanMlp
from linvit.model.transformer import LinformerTransformer

# Why other model classes cannot be converted.
_RELATIVE = "its attention adds a bias for every pair of positions, and a projected key has no position"
_WINDOWS = "it attends within windows, whose sequences are already short"
_REFUSED: dict[str, str] = {
    "NaFlexVit": "it packs images of any grid into one batch, and a projection is made for one grid",
    "Beit": _RELATIVE,
    "VisionTransformerRelPos": _RELATIVE,
    "VisionTransformerSAM": f"{_WINDOWS}, with relative positions",
    "SwinTransformer": _WINDOWS,
    "SwinTransformerV2": _WINDOWS,
    "VisionTransformerDistilled": "its distillation token has its own classifier",
}
_REFUSED_BLOCKS: dict[str, str] = {
    "ResPostBlock": "its blocks normalise after attention and MLP",
    "ParallelScalingBlock": "its blocks run attention and MLP in parallel",
    "DiffParallelScalingBlock": "its blocks run attention and MLP in parallel",
    "ParallelThingsBlock": "its blocks run several attention layers in parallel",
}

_NORMS = ("layernorm", "rmsnorm", "simplenorm", "layernormfp32", "rmsnormfp32", "simplenormfp32")
_ACTIVATIONS = ("gelu_tanh", "quick_gelu", "gelu", "silu", "relu", "mish", "hard_swish", "leaky_relu")


def vit_keywords(model: nn.Module) -> dict[str, Any]:
    """Keywords with which `LinformerViT` builds the same model, except for its projections.

    Raises ValueError, naming the class and the reason, for a model that cannot be converted.
    """
    _check_convertible(model)
    assert isinstance(model, VisionTransformer)
    block = model.blocks[0]
    has_fc_norm = not isinstance(model.fc_norm, nn.Identity)
    return {
        **common_keywords(model),
        "num_heads": block.attn.num_heads,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(block.attn.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(block.mlp.norm, nn.Identity),
        "proj_bias": block.attn.proj.bias is not None,
        # 0 disables LayerScale. timm drops keywords that are None, and registered models may have it by default.
        "init_values": block.ls1.init_values if isinstance(block.ls1, LayerScale) else 0.0,
        "class_token": model.has_class_token,
        "reg_tokens": model.num_reg_tokens,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": has_fc_norm or not isinstance(model.norm, nn.Identity),
        "fc_norm": has_fc_norm,
        "pool_include_prefix": model.pool_include_prefix,
        **_mlp_keywords(block.mlp, model.embed_dim),
        **_norm_keywords(model),
    }


def common_keywords(model: Any) -> dict[str, Any]:
    """The keywords that timm's `VisionTransformer` and `Eva` share."""
    embed, block = model.patch_embed, model.blocks[-1]
    return {
        "img_size": list(embed.img_size),
        "patch_size": embed.patch_size[0] if embed.patch_size[0] == embed.patch_size[1] else list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "no_embed_class": model.no_embed_class,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
        "proj_drop_rate": block.attn.proj_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        # timm raises the rate linearly from 0 to this value in the last block.
        "drop_path_rate": getattr(block.drop_path1, "drop_prob", 0.0),
    }


def _check_convertible(model: Any) -> None:
    if type(model) is not VisionTransformer:
        reasons = [_REFUSED[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _REFUSED]
        reason = reasons[0] if reasons else "only timm's VisionTransformer and Eva can be"
        if isinstance(model, LinformerTransformer):
            reason = "its attention is already projected"
        raise ValueError(f"{type(model).__name__} cannot be converted: {reason}")
    blocks = list(model.blocks)
    for layer in (block for block in blocks if type(block) is not Block):
        raise refusal(layer, _REFUSED_BLOCKS.get(type(layer).__name__, "its blocks are not timm's Block"))
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        raise refusal(embed, "its patch embedding is not timm's PatchEmbed")
    if embed.img_size is None:
        raise refusal(embed, "it has no fixed image size, and a projection is made for one grid")
    for attention in (block.attn for block in blocks):
        if type(attention) is not Attention or type(attention.qkv) is not nn.Linear:
            raise refusal(attention, "its attention is not timm's Attention with a single linear layer for q, k and v")
        if attention.gate is not None:
            raise refusal(attention, "its attention is gated")


def refusal(part: nn.Module, reason: str) -> ValueError:
    """The error for a model with such a part."""
    return ValueError(f"a Vision Transformer with {type(part).__name__} cannot be converted: {reason}")


def _mlp_keywords(mlp: nn.Module, dim: int) -> dict[str, Any]:
    """The MLP's kind, ratio and activation."""
    if type(mlp) in (Mlp, LeanMlp):
        name, hidden = "mlp", mlp.fc1
    elif type(mlp) is GluMlp and not mlp.gate_last:
        name, hidden = "swiglu_packed", mlp.fc1
    elif type(mlp) is SwiGLU:
        name, hidden = "swiglu", mlp.fc1_x
    else:
        raise refusal(mlp, "its MLP is not timm's Mlp, SwiGLU or SwiGLUPacked")
    assert isinstance(hidden, nn.Linear)
    return {"mlp_layer": name, "mlp_ratio": mlp_ratio(hidden.out_features, dim), **_activation_keywords(mlp.act)}


def mlp_ratio(width: int, dim: int) -> float:
    """A ratio for which `int(dim * ratio)`, as in timm, is the MLP's width."""
    exact = width / dim
    return exact if int(dim * exact) == width else (width + 0.5) / dim


def _activation_keywords(act: Any) -> dict[str, Any]:
    if type(act) is nn.GELU and act.approximate == "none":
        return {}
    name = next((name for name in _ACTIVATIONS if get_act_layer(name) is type(act)), None)
    if name is None:
        raise refusal(act, "timm has no name for its activation")
    return {"act_layer": name}


def _norm_keywords(model: VisionTransformer) -> dict[str, Any]:
    """The normalisation of the blocks, and of the patch embedding if it has one."""
    norm = model.blocks[0].norm1
    names: dict[str, Any] = {"norm_layer": norm_name(norm)}
    if not isinstance(model.patch_embed.norm, nn.Identity):
        names["embed_norm_layer"] = norm_name(model.patch_embed.norm)
    return {**names, "norm_eps": norm.eps}


def norm_name(norm: nn.Module) -> str:
    """timm's name of a normalisation; raises ValueError if it has none."""
    name = next((name for name in _NORMS if norm_class(name) is type(norm)), None)
    if name is None:
        raise refusal(norm, "timm has no name for its normalisation")
    return name
