"""Small models, their attention matrices computed by the textbook, and spectra made by hand."""

from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from linvit.model.attention import LinformerAttention
from linvit.model.projections import MatrixProjection
from linvit.spectrum.result import Spectrum

SHAPE = {"img_size": (28, 20), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}


def timm_vit(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> Any:
    """A timm ViT of 36 tokens in double precision, with weights large enough for uneven attention."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SHAPE, **kwargs}).double().eval()
    return _sharpen(model)


def linformer_vit(**kwargs: Any) -> Any:
    return timm_vit("linvit_mini_patch4_64", **{"k": 6, **kwargs})


def _sharpen(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "qkv" in name:
            nn.init.normal_(parameter, std=0.7)
    return model


def images(batch: int = 2, size: tuple[int, int] = (28, 20)) -> Tensor:
    return torch.randn(batch, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def textbook_matrices(model: Any, images: Tensor) -> Tensor:
    """Attention matrices of each image, layer and head, (B, L, H, T, T), computed from the layers' inputs.

    Asserts that they reproduce the layers' outputs.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        inputs.append(given[0])
        outputs.append(out)

    hooks = [block.attn.register_forward_hook(keep) for block in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    layers = []
    for block, x, out in zip(model.blocks, inputs, outputs):
        matrix, values = _textbook(block.attn, x, model.num_prefix_tokens)
        again = block.attn.proj((matrix @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(again, out, rtol=1e-9, atol=1e-9)
        layers.append(matrix)
    return torch.stack(layers, dim=1)


def _textbook(attn: Any, x: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    projections = attn.projections() if isinstance(attn, LinformerAttention) else None
    keys, bias, mixing = attn.k_norm(k), 0.0, torch.eye(x.shape[1], dtype=x.dtype)
    if projections is not None:
        E, F = (_dense(projection, attn.num_heads, num_prefix) for projection in projections)  # (H, K, T)
        keys, mixing = attn.k_norm(E @ k), F
        bias = _key_bias(projections[0].lengths, attn.num_heads, x.shape[1] - num_prefix, num_prefix)
    scores = attn.q_norm(q) @ keys.mT * attn.head_dim**-0.5 + bias
    return scores.softmax(dim=-1) @ mixing, v


def _dense(projection: Any, num_heads: int, num_prefix: int) -> Tensor:
    assert isinstance(projection, MatrixProjection)
    prefix = torch.eye(num_prefix, dtype=torch.float64)
    return torch.stack(
        [torch.block_diag(prefix, each) for each in projection.matrix().double().expand(num_heads, -1, -1)]
    )


def _key_bias(lengths: list[int], num_heads: int, num_patches: int, num_prefix: int) -> Tensor:
    """log(N/k) for projected keys, 0 for prefix tokens, and -inf for padding: (H, 1, K)."""
    bias = torch.full((num_heads, 1, num_prefix + max(lengths)), -torch.inf, dtype=torch.float64)
    for head, k in enumerate(lengths * (num_heads // len(lengths))):
        bias[head, :, : num_prefix + k] = np.log(num_patches / k) if num_prefix else 0.0
        bias[head, :, :num_prefix] = 0.0
    return bias


def make_spectrum(ranks: list[list[float]], *, grid_size: tuple[int, int] = (16, 16), **changes: Any) -> Spectrum:
    """A spectrum whose singular values fall as exp(−i / rank), a rank per layer and head."""
    decay = np.array(ranks, dtype=float)[..., None]
    values = np.exp(-np.arange(grid_size[0] * grid_size[1] + 1) / decay)
    facts: dict[str, Any] = {
        "model": "vit",
        "img_size": (16 * grid_size[0], 16 * grid_size[1]),
        "grid_size": grid_size,
        "num_prefix_tokens": 1,
        "num_images": 2,
        "method": "exact",
        "embed_dim": 96,
        "flops_besides_attention": 10**8,
        "singular_values": values,
        "energies": values**2,
        "total_energies": (values**2).sum(-1),
    }
    return Spectrum(**{**facts, **changes})
