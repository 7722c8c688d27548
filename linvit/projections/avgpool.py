"""Average pooling to k_h × k_w cells (Wang et al. 2020, section 4, "general projections").

Cells are averaged by area, so a grid that the cells do not divide loses no patch, and a finer grid gives the same
keys on the same picture. No parameters; every head and layer may share it.
"""

from typing import Optional

import torch
from torch import Tensor

from linvit.projections.base import Projection, register_projection
from linvit.projections.grid import GridSize, averaging_matrix, check_cells, factor_pair
from linvit.projections.separable import project_separable


@register_projection("avgpool")
class AveragePoolProjection(Projection):
    """E averages the patches of each cell. Heads cannot differ, so there is one map however many are asked for."""

    def create_parameters(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self.num_maps = 1
        self.cells = factor_pair(self.k, self.grid_size)

    def forward(self, x: Tensor, grid_size: Optional[tuple[int, int]] = None) -> Tensor:  # noqa: UP045
        height, width = self.grid_size if grid_size is None else grid_size
        weight_h = averaging_matrix(self.cells[0], height, device=x.device, dtype=x.dtype)
        weight_w = averaging_matrix(self.cells[1], width, device=x.device, dtype=x.dtype)
        return project_separable(x, weight_h[None], weight_w[None])

    def matrix(self) -> Tensor:
        weight_h, weight_w = (
            averaging_matrix(cells, size, device=torch.device("cpu"), dtype=torch.float64)
            for cells, size in zip(self.cells, self.grid_size)
        )
        return torch.kron(weight_h, weight_w)[None]

    def check_grid_size(self, grid_size: GridSize) -> None:
        super().check_grid_size(grid_size)
        check_cells(self.cells, grid_size)
