"""The registered models: LinformerViT and LinformerEva under timm names, with their default configurations.

Sizes are those of the ViT (Dosovitskiy et al. 2021; DeiT for tiny and small). Every keyword of timm's class and of ours
overrides a default. The `_rope_` names have the rotary embedding of DINOv3 instead of a learned position embedding, and
an average over patches instead of a class token. All models default to `projection="separable"` and `share="kv"`: E
costs k_h·H + k_w·W parameters per layer and can be moved to any other grid.
"""

from typing import Any

from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from linvit.model.eva import LinformerEva
from linvit.model.sharing import checkpoint_filter_fn
from linvit.model.vit import LinformerViT

TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
# For CPUs and demonstrations. With two heads of width 32, up to 32 keys use the folded order.
MINI = {"embed_dim": 64, "depth": 4, "num_heads": 2}
# Rotary embedding as in DINOv3, whose coordinates run from -1 to 1 at every size.
ROPE = {
    "attn_type": "rope",
    "use_abs_pos_emb": False,
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_temperature": 100.0,
    "rope_rotate_half": True,
    "class_token": False,
    "global_pool": "avg",
}


def _cfg(size: int, **overrides: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.9 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **overrides,
    }


_DINOV2_INPUT = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}

default_cfgs = generate_default_cfgs(
    {
        "linvit_tiny_patch16_224.untrained": _cfg(224),
        "linvit_small_patch16_224.untrained": _cfg(224),
        "linvit_base_patch16_224.untrained": _cfg(224),
        "linvit_large_patch16_224.untrained": _cfg(224),
        "linvit_tiny_patch16_384.untrained": _cfg(384),
        "linvit_small_patch16_384.untrained": _cfg(384),
        "linvit_base_patch16_384.untrained": _cfg(384),
        "linvit_tiny_patch8_224.untrained": _cfg(224),
        "linvit_small_patch8_224.untrained": _cfg(224),
        "linvit_base_patch8_224.untrained": _cfg(224),
        "linvit_tiny_patch16_512.untrained": _cfg(512),
        "linvit_small_patch16_512.untrained": _cfg(512),
        "linvit_base_patch16_512.untrained": _cfg(512),
        "linvit_tiny_patch16_1024.untrained": _cfg(1024),
        "linvit_small_patch16_1024.untrained": _cfg(1024),
        "linvit_base_patch16_1024.untrained": _cfg(1024),
        "linvit_small_patch16_2048.untrained": _cfg(2048),
        "linvit_small_patch14_518.untrained": _cfg(518, **_DINOV2_INPUT),
        "linvit_base_patch14_518.untrained": _cfg(518, **_DINOV2_INPUT),
        "linvit_tiny_patch16_rope_224.untrained": _cfg(224),
        "linvit_small_patch16_rope_224.untrained": _cfg(224),
        "linvit_base_patch16_rope_224.untrained": _cfg(224),
        "linvit_tiny_patch16_rope_512.untrained": _cfg(512),
        "linvit_small_patch16_rope_512.untrained": _cfg(512),
        "linvit_base_patch16_rope_512.untrained": _cfg(512),
        "linvit_tiny_patch16_rope_1024.untrained": _cfg(1024),
        "linvit_small_patch16_rope_1024.untrained": _cfg(1024),
        "linvit_base_patch16_rope_1024.untrained": _cfg(1024),
        "linvit_mini_patch4_rope_64.untrained": _cfg(64),
        "linvit_mini_patch4_64.untrained": _cfg(64),
        "linvit_mini_patch8_288.untrained": _cfg(288),
    }
)


def create(variant: str, pretrained: bool, **kwargs: Any) -> LinformerViT:
    """Build the registered model `variant` as timm builds its models; `kwargs` go to LinformerViT."""
    return _build(LinformerViT, variant, pretrained, kwargs)


def create_rotary(variant: str, pretrained: bool, **kwargs: Any) -> LinformerEva:
    """Build the registered rotary model `variant` as timm builds its models; `kwargs` go to LinformerEva."""
    return _build(LinformerEva, variant, pretrained, kwargs)


def _build(cls: type, variant: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def linvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-Ti/16 at 224²: 196 patches, k=49, separable, kv."""
    defaults = dict(patch_size=16, k=49, **TINY)
    return create("linvit_tiny_patch16_224", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-S/16 at 224²: 196 patches, k=49, separable, kv."""
    defaults = dict(patch_size=16, k=49, **SMALL)
    return create("linvit_small_patch16_224", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-B/16 at 224²: 196 patches, k=49, separable, kv."""
    defaults = dict(patch_size=16, k=49, **BASE)
    return create("linvit_base_patch16_224", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-L/16 at 224²: 196 patches, k=49, separable, kv."""
    defaults = dict(patch_size=16, k=49, **LARGE)
    return create("linvit_large_patch16_224", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_tiny_patch16_384(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-Ti/16 at 384²: 576 patches, k=64, separable, kv."""
    defaults = dict(patch_size=16, k=64, **TINY)
    return create("linvit_tiny_patch16_384", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_small_patch16_384(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-S/16 at 384²: 576 patches, k=64, separable, kv."""
    defaults = dict(patch_size=16, k=64, **SMALL)
    return create("linvit_small_patch16_384", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_base_patch16_384(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-B/16 at 384²: 576 patches, k=64, separable, kv."""
    defaults = dict(patch_size=16, k=64, **BASE)
    return create("linvit_base_patch16_384", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_tiny_patch8_224(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-Ti/8 at 224²: 784 patches, k=64, separable, kv."""
    defaults = dict(patch_size=8, k=64, **TINY)
    return create("linvit_tiny_patch8_224", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_small_patch8_224(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-S/8 at 224²: 784 patches, k=64, separable, kv."""
    defaults = dict(patch_size=8, k=64, **SMALL)
    return create("linvit_small_patch8_224", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_base_patch8_224(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-B/8 at 224²: 784 patches, k=64, separable, kv."""
    defaults = dict(patch_size=8, k=64, **BASE)
    return create("linvit_base_patch8_224", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_tiny_patch16_512(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-Ti/16 at 512²: 1,024 patches, k=64, separable, kv."""
    defaults = dict(patch_size=16, k=64, **TINY)
    return create("linvit_tiny_patch16_512", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_small_patch16_512(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-S/16 at 512²: 1,024 patches, k=64, separable, kv."""
    defaults = dict(patch_size=16, k=64, **SMALL)
    return create("linvit_small_patch16_512", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_base_patch16_512(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-B/16 at 512²: 1,024 patches, k=64, separable, kv."""
    defaults = dict(patch_size=16, k=64, **BASE)
    return create("linvit_base_patch16_512", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_tiny_patch16_1024(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-Ti/16 at 1024²: 4,096 patches, k=256, separable, kv."""
    defaults = dict(patch_size=16, k=256, **TINY)
    return create("linvit_tiny_patch16_1024", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_small_patch16_1024(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-S/16 at 1024²: 4,096 patches, k=256, separable, kv."""
    defaults = dict(patch_size=16, k=256, **SMALL)
    return create("linvit_small_patch16_1024", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_base_patch16_1024(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-B/16 at 1024²: 4,096 patches, k=256, separable, kv."""
    defaults = dict(patch_size=16, k=256, **BASE)
    return create("linvit_base_patch16_1024", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_small_patch16_2048(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-S/16 at 2048²: 16,384 patches, k=256, separable, kv."""
    defaults = dict(patch_size=16, k=256, **SMALL)
    return create("linvit_small_patch16_2048", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_small_patch14_518(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-S/14 at 518² in the layout of DINOv2 (LayerScale): 1,369 patches, k=64, separable, kv."""
    defaults = dict(patch_size=14, k=64, init_values=1e-5, **SMALL)
    return create("linvit_small_patch14_518", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_base_patch14_518(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """ViT-B/14 at 518² in the layout of DINOv2 (LayerScale): 1,369 patches, k=64, separable, kv."""
    defaults = dict(patch_size=14, k=64, init_values=1e-5, **BASE)
    return create("linvit_base_patch14_518", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_mini_patch4_64(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """Width 64, depth 4, patch 4 at 64²: 256 patches, k=16, separable, kv."""
    defaults = dict(patch_size=4, k=16, **MINI)
    return create("linvit_mini_patch4_64", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_mini_patch8_288(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
    """Width 64, depth 4, patch 8 at 288²: 1,296 patches, k=25, separable, kv."""
    defaults = dict(patch_size=8, k=25, **MINI)
    return create("linvit_mini_patch8_288", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_tiny_patch16_rope_224(pretrained: bool = False, **kwargs: Any) -> LinformerEva:
    """ViT-Ti/16 with rotary embedding at 224²: 196 patches, k=49, separable, kv."""
    defaults = dict(patch_size=16, img_size=224, k=49, **TINY, **ROPE)
    return create_rotary("linvit_tiny_patch16_rope_224", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_small_patch16_rope_224(pretrained: bool = False, **kwargs: Any) -> LinformerEva:
    """ViT-S/16 with rotary embedding at 224²: 196 patches, k=49, separable, kv."""
    defaults = dict(patch_size=16, img_size=224, k=49, **SMALL, **ROPE)
    return create_rotary("linvit_small_patch16_rope_224", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_base_patch16_rope_224(pretrained: bool = False, **kwargs: Any) -> LinformerEva:
    """ViT-B/16 with rotary embedding at 224²: 196 patches, k=49, separable, kv."""
    defaults = dict(patch_size=16, img_size=224, k=49, **BASE, **ROPE)
    return create_rotary("linvit_base_patch16_rope_224", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_tiny_patch16_rope_512(pretrained: bool = False, **kwargs: Any) -> LinformerEva:
    """ViT-Ti/16 with rotary embedding at 512²: 1,024 patches, k=64, separable, kv."""
    defaults = dict(patch_size=16, img_size=512, k=64, **TINY, **ROPE)
    return create_rotary("linvit_tiny_patch16_rope_512", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_small_patch16_rope_512(pretrained: bool = False, **kwargs: Any) -> LinformerEva:
    """ViT-S/16 with rotary embedding at 512²: 1,024 patches, k=64, separable, kv."""
    defaults = dict(patch_size=16, img_size=512, k=64, **SMALL, **ROPE)
    return create_rotary("linvit_small_patch16_rope_512", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_base_patch16_rope_512(pretrained: bool = False, **kwargs: Any) -> LinformerEva:
    """ViT-B/16 with rotary embedding at 512²: 1,024 patches, k=64, separable, kv."""
    defaults = dict(patch_size=16, img_size=512, k=64, **BASE, **ROPE)
    return create_rotary("linvit_base_patch16_rope_512", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_tiny_patch16_rope_1024(pretrained: bool = False, **kwargs: Any) -> LinformerEva:
    """ViT-Ti/16 with rotary embedding at 1024²: 4,096 patches, k=256, separable, kv."""
    defaults = dict(patch_size=16, img_size=1024, k=256, **TINY, **ROPE)
    return create_rotary("linvit_tiny_patch16_rope_1024", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_small_patch16_rope_1024(pretrained: bool = False, **kwargs: Any) -> LinformerEva:
    """ViT-S/16 with rotary embedding at 1024²: 4,096 patches, k=256, separable, kv."""
    defaults = dict(patch_size=16, img_size=1024, k=256, **SMALL, **ROPE)
    return create_rotary("linvit_small_patch16_rope_1024", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_base_patch16_rope_1024(pretrained: bool = False, **kwargs: Any) -> LinformerEva:
    """ViT-B/16 with rotary embedding at 1024²: 4,096 patches, k=256, separable, kv."""
    defaults = dict(patch_size=16, img_size=1024, k=256, **BASE, **ROPE)
    return create_rotary("linvit_base_patch16_rope_1024", pretrained, **dict(defaults, **kwargs))


@register_model
def linvit_mini_patch4_rope_64(pretrained: bool = False, **kwargs: Any) -> LinformerEva:
    """Width 64, depth 4, patch 4 with rotary embedding at 64²: 256 patches, k=16, separable, kv."""
    defaults = dict(patch_size=4, img_size=64, k=16, **MINI, **ROPE)
    return create_rotary("linvit_mini_patch4_rope_64", pretrained, **dict(defaults, **kwargs))
