"""Test-only models: registered names with each share mode as their default, for timm's model contract."""

from collections.abc import Callable
from typing import Any

from timm.models import generate_default_cfgs, register_model

from linvit import models
from linvit.vit import LinformerViT

BASES = ["linvit_mini_patch4_64", "linvit_tiny_patch16_224", "linvit_tiny_patch8_224"]
SHARES = ["none", "headwise", "kv", "layerwise"]

default_cfgs = generate_default_cfgs(
    {
        f"{base}_{share}.untrained": models.default_cfgs[base].default.to_dict()
        for base in BASES
        for share in SHARES
    }
)


def _variant(base: str, share: str) -> Callable[..., LinformerViT]:
    def create(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
        model: LinformerViT = getattr(models, base)(pretrained, **{"share": share, **kwargs})
        return model

    create.__name__ = f"{base}_{share}"
    create.__module__ = __name__
    return create


for _base in BASES:
    for _share in SHARES:
        globals()[f"{_base}_{_share}"] = register_model(_variant(_base, _share))
