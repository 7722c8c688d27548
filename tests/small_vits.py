"""LinformerViTs small enough to compare in every way, images for them, and what they keep for the backward pass."""

import torch

from linvit.model.vit import LinformerViT

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


def kept_elements(model, x):
    """The number of elements kept for the backward pass, without parameters and inputs."""
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
