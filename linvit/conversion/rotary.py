"""The keywords that build a LinformerEva like a given timm `Eva`, read from the model's modules."""

from typing import Any

from timm.layers import AttentionRope, GluMlp, Mlp, PatchEmbed, SwiGLU
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import nn

from linvit.conversion.compatibility import common_keywords, mlp_ratio, norm_name, refusal
from linvit.model.mlp import LeanMlp

# timm's names of the classes of rotary embedding.
_TYPES = {
    "RotaryEmbeddingCat": "cat",
    "RotaryEmbeddingMixed": "mixed",
    "RotaryEmbeddingDinoV3": "dinov3",
    "RotaryEmbeddingMRope": "mrope",
}
_AUGMENTED = ("shift_coords", "jitter_coords", "rescale_coords")


def rotary_keywords(model: Eva) -> dict[str, Any]:
    """Keywords with which `LinformerEva` builds the same model, except for its projections.

    Raises ValueError, naming the part and the reason, for a model that cannot be converted.
    """
    _check_parts(model)
    block, norm = model.blocks[0], model.blocks[0].norm1
    return {
        **common_keywords(model),
        "norm_layer": norm_name(norm),
        "norm_eps": norm.eps,
        "class_token": model.cls_token is not None,
        "num_reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_pre_transformer_norm": not isinstance(model.norm_pre, nn.Identity),
        "use_post_transformer_norm": not isinstance(model.norm, nn.Identity),
        "use_fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "head_init_scale": model.head_init_scale,
        **_attention_keywords(model),
        **_mlp_keywords(block.mlp, model.embed_dim),
        **_embedding_keywords(model),
        **_pool_keywords(model),
    }


def _check_parts(model: Eva) -> None:
    embed = model.patch_embed
    if type(embed) is not PatchEmbed or embed.img_size is None:
        raise refusal(embed, "its patch embedding is not timm's PatchEmbed of a fixed size")
    for block in model.blocks:
        if type(block) is not EvaBlock:
            raise refusal(block, "its blocks normalise after attention and MLP, or are not timm's EvaBlock")
        if type(block.attn) not in (EvaAttention, AttentionRope):
            raise refusal(block.attn, "its attention is not timm's EvaAttention or AttentionRope")
        if block.attn.gate is not None:
            raise refusal(block.attn, "its attention is gated, and timm's Eva has no keyword for that")


def _attention_keywords(model: Eva) -> dict[str, Any]:
    block = model.blocks[0]
    attention = block.attn
    is_rope = isinstance(attention, AttentionRope)
    layer = attention.q_proj if attention.qkv is None else attention.qkv
    found = {
        "num_heads": attention.num_heads,
        "attn_type": "rope" if is_rope else "eva",
        "qkv_fused": attention.qkv is not None,
        "qkv_bias": layer.bias is not None or getattr(attention, "q_bias", None) is not None,
        "qk_norm": not isinstance(attention.q_norm, nn.Identity),
        "scale_attn_inner": not isinstance(attention.norm, nn.Identity),
    }
    if block.gamma_1 is not None:
        found |= {"init_values": block.init_values, "attn_only_layer_scale": block.gamma_2 is None}
    if is_rope and any(each.attn.num_kv_heads != each.attn.num_heads for each in model.blocks):
        found["num_kv_heads"] = [each.attn.num_kv_heads for each in model.blocks]
    return found


def _mlp_keywords(mlp: Any, dim: int) -> dict[str, Any]:
    is_scaled = not isinstance(mlp.norm, nn.Identity)
    if type(mlp) in (Mlp, LeanMlp):
        is_gated, width = False, mlp.fc1.out_features
    elif type(mlp) is SwiGLU:
        is_gated, width = True, mlp.fc1_x.out_features
    elif type(mlp) is GluMlp:
        is_gated, width = True, mlp.fc2.in_features
    else:
        raise refusal(mlp, "its MLP is not timm's Mlp, SwiGLU or GluMlp")
    ratio = mlp_ratio(width, dim)
    # timm builds a SwiGLU, which has two layers for a GluMlp's one, if it aligns the width; to 1, nothing changes.
    align = int(type(mlp) is SwiGLU and not is_scaled)
    return {"mlp_ratio": ratio, "swiglu_mlp": is_gated, "swiglu_align_to": align, "scale_mlp": is_scaled}


def _embedding_keywords(model: Eva) -> dict[str, Any]:
    rope = model.rope
    found: dict[str, Any] = {
        "use_rot_pos_emb": rope is not None,
        "rope_rotate_half": bool(model.blocks[0].attn.rotate_half),
    }
    if rope is None:
        return found
    kind = _TYPES.get(type(rope).__name__)
    if kind is None:
        raise refusal(rope, "its rotary embedding is not one of timm's")
    found["rope_type"] = kind
    found |= {f"rope_{name}": getattr(rope, name) for name in _AUGMENTED if getattr(rope, name, None) is not None}
    for name in ("temperature", "grid_offset", "grid_indexing"):
        if hasattr(rope, name):
            found[f"rope_{name}"] = getattr(rope, name)
    if kind == "mrope":
        found["rope_mrope_section"] = list(rope.mrope_section)
    if getattr(rope, "ref_feat_shape", None) is not None:
        found["ref_feat_shape"] = list(rope.ref_feat_shape)
    return found


def _pool_keywords(model: Eva) -> dict[str, Any]:
    pool = model.attn_pool
    if pool is None:
        return {}
    return {
        "attn_pool_num_heads": pool.num_heads,
        "attn_pool_mlp_ratio": mlp_ratio(pool.mlp.fc1.out_features, model.embed_dim),
    }
