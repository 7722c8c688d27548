"""Small models and groups for the tests of `linvit bench` and `linvit.measure`."""

from linvit.bench.options import Group

TIMM = "vit_tiny_patch16_224:depth=1,patch_size=4,embed_dim=64,num_heads=2"
OURS = "linvit_mini_patch4_64:depth=1,k=16"


def group(mode="train", **others):
    return Group(**{"models": (TIMM, OURS), "img_size": (32, 32), "mode": mode, "rounds": 2, **others})
