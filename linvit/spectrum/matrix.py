"""One head's attention matrix on one image, a block of rows at a time: N × N is never held unless it is asked for.

T tokens, K keys, d head width, C columns: K, or what K keys are mixed to.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of a block of rows: 64 MiB in single precision.
BLOCK_ENTRIES = 2**24


class AttentionMatrix:
    """softmax(Q Kᵀ · scale + bias) M, (T, C).

    Args:
        queries: Q (T, d).
        keys: K (K, d).
        scale: what scores are multiplied by.
        bias: added to the scores, (1 or T, K); None adds nothing.
        mixing: M (K, C), applied to the softmax; None is the identity.

    Softmax is taken in single precision, or in double where the queries have it.
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
        """Which rows, and these (t, C), from the first to the last."""
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
        """The sum of the squares of all entries, which is that of the squares of all singular values."""
        return sum(block.double().square().sum().item() for _, block in self.row_blocks())
