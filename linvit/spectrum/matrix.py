"""One head's attention matrix on one image, and its singular values: all of them, or the largest.

T tokens, K keys, d head width, C columns of the matrix.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Entries of a block of rows: 64 MiB in single precision.
BLOCK_ENTRIES = 2**24
# Random projection: columns beyond the requested rank, and passes over A and Aᵀ that sharpen the subspace.
OVERSAMPLING = 16
POWER_ITERATIONS = 2


class AttentionMatrix:
    """softmax(Q Kᵀ · scale + bias) M, (T, C), computed a block of rows at a time; the whole matrix is never stored.

    The softmax is taken in single precision, or in double if the queries are in double.

    Args:
        queries: Q (T, d).
        keys: K (K, d).
        scale: factor of the scores.
        bias: added to the scores, (1 or T, K); None adds nothing.
        mixing: M (K, C), by which the softmax is multiplied; None means the identity, so that C = K.
    """

    def __init__(
        self, queries: Tensor, keys: Tensor, *, scale: float, bias: Tensor | None = None, mixing: Tensor | None = None
    ) -> None:
        self.dtype = torch.promote_types(queries.dtype, torch.float32)
        self.device = queries.device
        self._queries = queries.to(self.dtype) * scale
        self._keys = keys.to(self.dtype)
        self._bias = None if bias is None else bias.to(self.dtype)
        self._mixing = None if mixing is None else mixing.to(self.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        columns = self._keys.shape[0] if self._mixing is None else self._mixing.shape[1]
        return self._queries.shape[0], columns

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of t rows from first to last: the slice of rows, and their values (t, C)."""
        num_rows = self._queries.shape[0]
        length = max(1, BLOCK_ENTRIES // self._keys.shape[0])
        for start in range(0, num_rows, length):
            rows = slice(start, min(start + length, num_rows))
            yield rows, self._rows(rows)

    def _rows(self, rows: slice) -> Tensor:
        scores = self._queries[rows] @ self._keys.mT
        if self._bias is not None:
            scores += self._bias if self._bias.shape[0] == 1 else self._bias[rows]
        attention = scores.softmax(dim=-1)
        return attention if self._mixing is None else attention @ self._mixing

    def __matmul__(self, x: Tensor) -> Tensor:
        """The matrix times x (C, r): (T, r)."""
        return torch.cat([block @ x for _, block in self.row_blocks()])

    def transposed_matmul(self, y: Tensor) -> Tensor:
        """The transposed matrix times y (T, r): (C, r)."""
        out = y.new_zeros(self.shape[1], y.shape[1])
        for rows, block in self.row_blocks():
            out.addmm_(block.mT, y[rows])
        return out

    def gram(self) -> Tensor:
        """The transposed matrix times the matrix, (C, C), in double precision."""
        out = torch.zeros(self.shape[1], self.shape[1], dtype=torch.float64, device=self.device)
        for _, block in self.row_blocks():
            precise = block.double()
            out.addmm_(precise.mT, precise)
        return out

    def energy(self) -> float:
        """The sum of squares of all entries, which equals that of all singular values."""
        return sum(block.double().square().sum().item() for _, block in self.row_blocks())


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
