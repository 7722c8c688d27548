"""Test-only models: registered names with each share mode as their default, for timm's model contract."""

from collections.abc import Callable
from typing import Any

from timm.models import generate_default_cfgs, register_model

from linvit.model import registry
from linvit.model.vit import LinformerViT

SHARES = ["none", "headwise", "kv", "layerwise"]
BASES: dict[str, dict[str, Any]] = {
    "linvit_mini_patch4_64": dict(patch_size=4, k=16, **registry.MINI),
    "linvit_tiny_patch16_224": dict(patch_size=16, k=49, **registry.TINY),
    "linvit_tiny_patch8_224": dict(patch_size=8, k=64, **registry.TINY),
}

default_cfgs = generate_default_cfgs(
    {f"{base}_{share}.untrained": registry.default_cfgs[base].default.to_dict() for base in BASES for share in SHARES}
)


def _variant(base: str, share: str) -> Callable[..., LinformerViT]:
    name = f"{base}_{share}"

    def create(pretrained: bool = False, **kwargs: Any) -> LinformerViT:
        return registry.create(name, pretrained, **dict(BASES[base], share=share, **kwargs))

    create.__name__ = name
    create.__module__ = __name__
    return create


for _base in BASES:
    for _share in SHARES:
        globals()[f"{_base}_{_share}"] = register_model(_variant(_base, _share))
