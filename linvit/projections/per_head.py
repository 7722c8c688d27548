"""A projected length of its own for every head: the paper's non-uniform projected dimension (section 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from linvit.projections.base import MatrixProjection, Projection
from linvit.projections.grid import GridSize


class PerHeadProjection(Projection):
    """One single-map projection per head; shorter results are filled up with zero rows to the longest, K.

    Whoever attends to the result masks the rows past `lengths`.
    """

    def __init__(self, heads: Sequence[Projection]) -> None:
        super().__init__(
            k=max(head.k for head in heads),
            grid_size=heads[0].grid_size,
            num_maps=len(heads),
            dim=heads[0].dim,
            init=heads[0].init,
        )
        self.kind = heads[0].kind
        self.absent = heads[0].absent
        self.heads = nn.ModuleList(heads)

    def each_head(self) -> list[Projection]:
        return [head for head in self.heads if isinstance(head, Projection)]

    @property
    def lengths(self) -> list[int]:
        return [head.k for head in self.each_head()]

    def forward(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        reduced = []
        for index, head in enumerate(self.each_head()):
            own = x if x.shape[1] == 1 else x[:, index : index + 1]
            y = head(own, grid_size)
            reduced.append(pad(y, (0, 0, 0, self.k - y.shape[2])))
        return torch.cat(reduced, dim=1)

    def row_mass(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        masses = [head.row_mass(x, grid_size) for head in self.each_head()]
        return torch.cat([pad(mass, (0, 0, 0, self.k - mass.shape[2])) for mass in masses], dim=1)

    def check_grid_size(self, grid_size: GridSize) -> None:
        for head in self.each_head():
            head.check_grid_size(grid_size)

    def set_grid_size(self, grid_size: GridSize) -> None:
        self.check_grid_size(grid_size)
        for head in self.each_head():
            head.set_grid_size(grid_size)
        self.grid_size = grid_size


class PerHeadMatrixProjection(PerHeadProjection, MatrixProjection):
    """The same for kinds that are matrices."""

    def matrix(self) -> Tensor:
        matrices = [head.matrix() for head in self.heads if isinstance(head, MatrixProjection)]
        return torch.cat([pad(E, (0, 0, 0, self.k - E.shape[1])) for E in matrices])
