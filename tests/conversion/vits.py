"""Small timm Vision Transformers whose attention matters, and images for them."""

import timm
import torch
from timm.models import VisionTransformer
from timm.models.eva import Eva
from torch import Tensor

from linvit.conversion.blocks import embed
from linvit.conversion.calibration import Activations

torch.set_num_threads(1)

SMALL = dict(embed_dim=32, depth=3, num_heads=2, img_size=64, patch_size=8, num_classes=5)


def make_vit(name: str = "vit_small_patch16_224", *, weight: float = 0.15, **kwargs) -> VisionTransformer:
    """A small registered model with random weights, biases and norms."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=weight)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_rotary(name: str = "vit_small_patch16_dinov3", **kwargs) -> Eva:
    """A small rotary model; DINOv3's has registers, LayerScale and no position embedding of its own."""
    return make_vit(name, **{"num_reg_tokens": 2, **kwargs})


def make_images(count: int, size: int = 64, seed: int = 1) -> Tensor:
    """Smooth random images with noise: (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return smooth + 0.3 * torch.randn(count, 3, size, size, generator=generator)


def make_activations(model: VisionTransformer, *, fitted: int = 16, held_out: int = 8) -> Activations:
    """The tokens that enter the first block, for `make_images`."""
    with torch.no_grad():
        tokens = embed(model, make_images(fitted + held_out))
    return Activations(tokens, tokens, held_out, model.num_prefix_tokens, batch_size=8)
