"""Maximum pooling to k_h × k_w cells (Wang et al. 2020, section 4, "general projections").

Every patch that overlaps a cell is included in its maximum, so neighbouring cells share patches if the cells do not
divide the grid. No parameters.

Differs from the paper: the tokens are pooled, before Wk and Wv.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from linvit.model.projections.avgpool import average_cells
from linvit.model.projections.base import Projection, register_projection
from linvit.model.projections.grid import GridSize, factor_pair


@register_projection("maxpool")
class MaxPoolProjection(Projection):
    """The largest value of each channel in each cell; a cell without a present patch gives zeros."""

    absent = -math.inf

    def forward(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        grid_size = grid_size or self.grid_size
        image = x.squeeze(1).unflatten(1, grid_size).permute(0, 3, 1, 2)  # (B, C, H, W), channels last
        cells = factor_pair(self.k, grid_size)
        pooled = _max_by_axis(image, cells) if torch.compiler.is_exporting() else F.adaptive_max_pool2d(image, cells)
        pooled = pooled.masked_fill(pooled == self.absent, 0.0)
        return pooled.flatten(2).mT[:, None]

    def row_mass(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        return average_cells(x, self.k, grid_size or self.grid_size)

    def check_grid_size(self, grid_size: GridSize) -> None:
        super().check_grid_size(grid_size)
        factor_pair(self.k, grid_size)


def _max_by_axis(image: Tensor, cells: GridSize) -> Tensor:
    """`adaptive_max_pool2d` as maxima of slices, for exporters, which know it only for cells that divide the grid."""
    for dim, number in zip((2, 3), cells):
        size = image.shape[dim]
        bounds = [(cell * size // number, -(-(cell + 1) * size // number)) for cell in range(number)]
        image = torch.stack([image.narrow(dim, a, b - a).amax(dim) for a, b in bounds], dim)
    return image
