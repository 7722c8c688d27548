"""Singular values of attention matrices: all of them, or only the largest.

T tokens, N patches, K keys, k projected length, M maps, C columns of a matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from linvit.measure.attention import AttentionMatrix, LayerAttention
from linvit.model.projections import MatrixProjection

# Random projection: columns beyond the requested rank, and passes over A and Aᵀ that sharpen the subspace.
OVERSAMPLING = 16
POWER_ITERATIONS = 2


class SingularValues(NamedTuple):
    """The largest singular values, descending, in double precision, and the energy Σσ² of all of them."""

    values: Tensor
    energy: float


def exact_singular_values(matrix: AttentionMatrix) -> SingularValues:
    """All C singular values of a matrix A (T, C), C ≤ T, as the roots of the eigenvalues of AᵀA.

    Squaring costs half the digits; in double precision, those left are more than single precision has.
    """
    squares = torch.linalg.eigvalsh(matrix.gram()).clamp(min=0).flip(0)
    return SingularValues(squares.sqrt().cpu(), squares.sum().item())


def randomized_singular_values(matrix: AttentionMatrix, *, rank: int, seed: int) -> SingularValues:
    """Lower bounds of the `rank` largest singular values, and the exact energy of all.

    Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), algorithm 4.4. The values are those of the matrix projected to a
    subspace, so they are never too large. Since the energy is exact, the missing energy is known exactly too.
    """
    columns = min(rank + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype).to(matrix.device)
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(matrix.transposed_matmul(_orthonormal(matrix @ basis)))
    range_basis = _orthonormal(matrix @ basis)
    values = torch.linalg.svdvals(matrix.transposed_matmul(range_basis))[:rank]
    return SingularValues(values.double().cpu(), matrix.energy())


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q


def mixing_with_equal_singular_values(layer: LayerAttention) -> Tensor | None:
    """W (M, K, K) with which P̄ W has the singular values of P̄ F; None for those of P̄ alone.

    With Fᵀ = Q R, P̄ F is P̄ Rᵀ Qᵀ. The columns of Q are orthonormal, so P̄ Rᵀ, which has only K columns, has the same
    singular values. If the projection is not a matrix (`maxpool`, `conv`), the matrix is P̄.

    Raises ValueError if the images have another grid than the model.
    """
    projection = layer.projection
    if not isinstance(projection, MatrixProjection):
        return None
    if projection.grid_size != layer.grid_size:
        raise ValueError(
            f"the images have {layer.grid_size[0]}×{layer.grid_size[1]} patches: call set_input_size() with their size"
        )
    values = projection.matrix().double()  # (M, k, N)
    triangle = torch.linalg.qr(values.mT, mode="r").R  # (M, k, k)
    num_prefix_tokens = layer.keys.shape[2] - projection.k
    prefix = torch.eye(num_prefix_tokens, dtype=values.dtype, device=values.device)
    return torch.stack([torch.block_diag(prefix, each.mT) for each in triangle])
