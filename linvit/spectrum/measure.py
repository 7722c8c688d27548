"""Singular values of attention matrices: all of them, or the largest by random projection.

All: the roots of the eigenvalues of AᵀA in double precision. Squaring costs half the digits, which leaves more than
single precision has; AᵀA is added up without ever holding A.

The largest: Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), algorithm 4.4. What is found lies in a subspace, so it
is never too large: every value is a lower bound. The energy of all values is known exactly, as the sum of the squares
of the entries of A, so the energy that is missing is known exactly too.

Singular values of a model's attention, averaged over images.
"""

import copy
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from linvit.measure.flops import count_flops
from linvit.model.attention import LinformerAttention
from linvit.spectrum.capture import AttentionMatrix, LayerAttention, Vit, as_vit, capture_attention
from linvit.spectrum.result import Spectrum

# Columns beyond the rank asked for, and passes over A and Aᵀ that sharpen the subspace.
OVERSAMPLING = 16
POWER_ITERATIONS = 2


class SingularValues(NamedTuple):
    """The largest singular values, descending, in double precision, and the energy Σσ² of all there are."""

    values: Tensor
    energy: float


def exact_singular_values(matrix: AttentionMatrix) -> SingularValues:
    """All singular values of a matrix (T, C), C ≤ T: C of them."""
    squares = torch.linalg.eigvalsh(matrix.gram()).clamp(min=0).flip(0)
    return SingularValues(squares.sqrt().cpu(), squares.sum().item())


def randomized_singular_values(matrix: AttentionMatrix, *, rank: int, seed: int) -> SingularValues:
    """Lower bounds of the `rank` largest singular values, and the exact energy of all."""
    columns = min(rank + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype).to(matrix.device)
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(matrix.transposed_matmul(_orthonormal(matrix @ basis)))
    range_basis = _orthonormal(matrix @ basis)
    values = torch.linalg.svdvals(matrix.transposed_matmul(range_basis))[:rank]
    return SingularValues(values.double().cpu(), matrix.energy())


def _orthonormal(x: Tensor) -> Tensor:
    return torch.linalg.qr(x).Q


Method = Literal["auto", "exact", "randomized"]
# Up to so many keys "auto" finds all singular values: beyond, those of one matrix take seconds.
MOST_EXACT = 3000


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
    """Singular values of the attention matrices of a Vision Transformer, timm's or ours, averaged over images.

    The matrix of a layer and head is T × T, T tokens, its rows the softmax that weighs the values (Wang et al. 2020,
    section 3 and Figure 1). Of a Linformer layer it is P̄ F: the weights of projected keys times the projection of
    values (E, where shared), prefix tokens as they are; or P̄, where the projection is no matrix. Matrices are formed
    one head at a time.

    Args:
        model: left as it was, in whatever mode it is.
        images: (B, 3, H, W), normalised, of the model's size and on its device.
        method: "exact" finds all T singular values, "randomized" lower bounds of the largest; "auto" is exact up to
            3,000 keys.
        rank: how many "randomized" finds.
        seed: of the random projection.
        progress: called with how many matrices are done, and how many there are.

    Raises ValueError for models whose attention is not one matrix a layer and head, and images of another size.
    """
    vit = as_vit(model)
    sums: _Sums | None = None
    for number, image in enumerate(images):
        layers = capture_attention(vit, image[None])
        if sums is None:
            _check_layers(layers)
            sums = _Sums(layers, method, rank)
        for row, layer in enumerate(layers):
            for head in range(layer.num_heads):
                sums.add(row, head, _singular_values(layer, head, method=method, rank=rank, seed=seed))
                if progress is not None:
                    done = (number * len(layers) + row) * layer.num_heads + head + 1
                    progress(done, len(images) * len(layers) * layer.num_heads)
    if sums is None:
        raise ValueError("there are no images to measure attention on")
    height, width = images.shape[-2:]
    rows, columns = vit.patch_embed.dynamic_feat_size((height, width))
    num_tokens = layers[0].queries.shape[2]
    return Spectrum(
        model=_name(model),
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
    )


class _Sums:
    """Sums over images of the singular values (L, H, R), of their squares, and of the energies (L, H)."""

    def __init__(self, layers: list[LayerAttention], method: Method, rank: int) -> None:
        num_tokens = layers[0].queries.shape[2]
        is_exact = all(_is_exact(layer.keys.shape[2], method, rank) for layer in layers)
        self.method: Literal["exact", "randomized"] = "exact" if is_exact else "randomized"
        shape = len(layers), layers[0].num_heads
        self.values = np.zeros((*shape, num_tokens if is_exact else rank))
        self.energies = np.zeros_like(self.values)
        self.totals = np.zeros(shape)

    def add(self, layer: int, head: int, found: SingularValues) -> None:
        # Fewer keys than tokens leave zeros.
        values = found.values.numpy()[: self.values.shape[-1]]
        self.values[layer, head, : len(values)] += values
        self.energies[layer, head, : len(values)] += values**2
        self.totals[layer, head] += found.energy


def _singular_values(layer: LayerAttention, head: int, *, method: Method, rank: int, seed: int) -> SingularValues:
    matrix = layer.matrix(head)
    if _is_exact(matrix.shape[1], method, rank):
        return exact_singular_values(matrix)
    return randomized_singular_values(matrix, rank=rank, seed=seed)


def _is_exact(num_keys: int, method: Method, rank: int) -> bool:
    return method == "exact" or num_keys <= rank or (method == "auto" and num_keys <= MOST_EXACT)


def _check_layers(layers: list[LayerAttention]) -> None:
    shapes = {(layer.num_heads, layer.queries.shape[2]) for layer in layers}
    if len(shapes) > 1:
        raise ValueError("the model's layers differ in heads or tokens: their spectra cannot be compared")


def _name(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(model).__name__


def _flops_besides_attention(model: Vit, image: Tensor, num_tokens: int) -> int:
    # torch's counter stumbles over parameters that are inputs of modules and want a gradient.
    bare = copy.deepcopy(model).to("meta").requires_grad_(False)
    total = count_flops(bare, image, mode="forward")
    width = bare.embed_dim
    tokens = image.new_empty(1, num_tokens, width)
    ours = [module for module in bare.modules() if isinstance(module, LinformerAttention)]
    if ours:
        return total - sum(count_flops(layer, tokens, mode="forward") for layer in ours)
    # Four products with D × D weights, two with N × N attention; two operations a multiply-add.
    ordinary = 2 * num_tokens * width * (4 * width + 2 * num_tokens)
    return total - len(bare.blocks) * ordinary
