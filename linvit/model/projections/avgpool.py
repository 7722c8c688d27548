"""Average pooling to k_h × k_w cells (Wang et al. 2020, section 4, "general projections").

Cells are averaged by area, so every patch counts even if the cells do not divide the grid, and a finer grid of the same
shape gives the same keys for the same image. No parameters.
"""

import torch
from torch import Tensor

from linvit.model.projections.base import MatrixProjection, register_projection
from linvit.model.projections.grid import GridSize, averaging_matrix, factor_pair
from linvit.model.projections.separable import project_separable


@register_projection("avgpool")
class AveragePoolProjection(MatrixProjection):
    """E averages the patches of each cell; the cells follow from k and the shape of the grid."""

    def forward(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        return average_cells(x, self.k, grid_size or self.grid_size)

    def row_mass(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        return average_cells(x, self.k, grid_size or self.grid_size)

    def matrix(self) -> Tensor:
        return torch.kron(*_averages(self.k, self.grid_size, torch.device("cpu"), torch.float64))[None]

    def check_grid_size(self, grid_size: GridSize) -> None:
        super().check_grid_size(grid_size)
        factor_pair(self.k, grid_size)


def average_cells(x: Tensor, k: int, grid_size: GridSize) -> Tensor:
    """Average x (B, M, N, C) over each of k cells, by area: (B, M, k, C)."""
    weight_h, weight_w = _averages(k, grid_size, x.device, x.dtype)
    return project_separable(x, weight_h[None], weight_w[None])


def _averages(k: int, grid_size: GridSize, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    (k_h, k_w), (height, width) = factor_pair(k, grid_size), grid_size
    return (
        averaging_matrix(k_h, height, device=device, dtype=dtype),
        averaging_matrix(k_w, width, device=device, dtype=dtype),
    )
