"""Singular values of attention matrices: all of them, or the largest by random projection.

All: the roots of the eigenvalues of AᵀA in double precision. Squaring costs half the digits, which leaves more than
single precision has; AᵀA is added up without ever holding A.

The largest: Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), algorithm 4.4. What is found lies in a subspace, so it
is never too large: every value is a lower bound. The energy of all values is known exactly, as the sum of the squares
of the entries of A, so the energy that is missing is known exactly too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from linvit.spectrum.matrix import AttentionMatrix

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
