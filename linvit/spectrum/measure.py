"""Average the singular values of a model's attention matrices over images."""

import copy
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from linvit.measure.attention import AttentionMatrix, LayerAttention, Vit, as_vit, capture_attention
from linvit.measure.timing import count_flops
from linvit.model.eva import rotary_of_layers
from linvit.model.projected import ProjectedAttention
from linvit.spectrum.result import Spectrum
from linvit.spectrum.singular_values import (
    SingularValues,
    exact_singular_values,
    mixing_with_equal_singular_values,
    randomized_singular_values,
)

Method = Literal["auto", "exact", "randomized"]
# With more keys, all singular values of one matrix take seconds, and "auto" finds the largest alone.
MAX_EXACT_KEYS = 3000


@torch.no_grad()
def attention_spectrum(
    model: nn.Module,
    images: Tensor,
    *,
    method: Method = "auto",
    rank: int = 512,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Spectrum:
    """Singular values of a Vision Transformer's attention matrices (timm's or linvit's), averaged over images.

    The matrix of a layer and head is T × T for T tokens; its rows are the softmax that weights the values (Wang et al.
    2020, section 3 and Figure 1). The matrix of a Linformer layer is P̄ F: the weights of projected keys times the
    projection of values (E if it is shared), with prefix tokens unchanged. If the projection is not a matrix, it is P̄.
    Matrices are formed one head at a time.

    Args:
        model: may be in any mode, and is restored afterwards.
        images: (B, 3, height, width), normalised, of the model's size and on its device.
        method: "exact" finds all T singular values, "randomized" lower bounds of the largest; "auto" is exact up to
            3,000 keys.
        rank: number of singular values that "randomized" finds.
        seed: seed of the random projection.
        progress: called after each matrix with the number of finished matrices and their total.

    Raises ValueError if the model's attention is not one matrix per layer and head, if the images do not have the
    model's size, or if there are no images.
    """
    vit = as_vit(model)
    sums: _Sums | None = None
    for number, image in enumerate(images):
        layers, _ = capture_attention(vit, image[None])
        if sums is None:
            if len({(layer.num_heads, layer.queries.shape[2]) for layer in layers}) > 1:
                raise ValueError("the model's layers differ in heads or tokens: their spectra cannot be compared")
            sums = _Sums(layers, method, rank)
        for row, layer in enumerate(layers):
            mixing = mixing_with_equal_singular_values(layer)
            for head in range(layer.num_heads):
                sums.add(
                    row, head, _singular_values(layer.matrix(head, mixing=mixing), method=method, rank=rank, seed=seed)
                )
                if progress is not None:
                    done = (number * len(layers) + row) * layer.num_heads + head + 1
                    progress(done, len(images) * len(layers) * layer.num_heads)
    if sums is None:
        raise ValueError("there are no images to measure attention on")
    height, width = images.shape[-2:]
    rows, columns = vit.patch_embed.dynamic_feat_size((height, width))
    num_tokens = layers[0].queries.shape[2]
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return Spectrum(
        model=cfg.get("architecture") or type(model).__name__,
        img_size=(height, width),
        grid_size=(int(rows), int(columns)),
        num_prefix_tokens=num_tokens - int(rows * columns),
        num_images=len(images),
        method=sums.method,
        embed_dim=vit.embed_dim,
        flops_besides_attention=_flops_besides_attention(vit, images[:1].to("meta"), num_tokens),
        singular_values=sums.values / len(images),
        energies=sums.energies / len(images),
        total_energies=sums.totals / len(images),
        rotary=any(rope is not None for rope in rotary_of_layers(vit)),
    )


class _Sums:
    """Sums over images of singular values (L, H, R), their squares, and the energies (L, H)."""

    def __init__(self, layers: list[LayerAttention], method: Method, rank: int) -> None:
        num_tokens = layers[0].queries.shape[2]
        is_exact = all(_is_exact(layer.keys.shape[2], method, rank) for layer in layers)
        self.method: Literal["exact", "randomized"] = "exact" if is_exact else "randomized"
        shape = len(layers), layers[0].num_heads
        self.values = np.zeros((*shape, num_tokens if is_exact else rank))
        self.energies = np.zeros_like(self.values)
        self.totals = np.zeros(shape)

    def add(self, layer: int, head: int, found: SingularValues) -> None:
        # A layer with fewer keys than tokens leaves the rest at zero.
        values = found.values.numpy()[: self.values.shape[-1]]
        self.values[layer, head, : len(values)] += values
        self.energies[layer, head, : len(values)] += values**2
        self.totals[layer, head] += found.energy


def _singular_values(matrix: AttentionMatrix, *, method: Method, rank: int, seed: int) -> SingularValues:
    if _is_exact(matrix.shape[1], method, rank):
        return exact_singular_values(matrix)
    return randomized_singular_values(matrix, rank=rank, seed=seed)


def _is_exact(num_keys: int, method: Method, rank: int) -> bool:
    return method == "exact" or num_keys <= rank or (method == "auto" and num_keys <= MAX_EXACT_KEYS)


def _flops_besides_attention(model: Vit, image: Tensor, num_tokens: int) -> int:
    # torch's counter fails on parameters that are inputs of modules and require a gradient.
    bare = copy.deepcopy(model).to("meta").requires_grad_(False)
    total = count_flops(bare, image, mode="forward")
    width = bare.embed_dim
    tokens = image.new_empty(1, num_tokens, width)
    layers = [module for module in bare.modules() if isinstance(module, ProjectedAttention)]
    if layers:
        arguments = [{} if rope is None else {"rope": rope} for rope in rotary_of_layers(bare)]
        return total - sum(count_flops(layer, tokens, mode="forward", **own) for layer, own in zip(layers, arguments))
    # Four products with D × D weights, two with the T × T attention; two operations per multiply-add.
    ordinary = 2 * num_tokens * width * (4 * width + 2 * num_tokens)
    return total - len(bare.blocks) * ordinary
