"""E = I: ordinary softmax attention in the same class, as a baseline and for ablations."""

import torch
from torch import Tensor

from linvit.model.projections.base import MatrixProjection, register_projection
from linvit.model.projections.grid import GridSize


@register_projection("identity")
class IdentityProjection(MatrixProjection):
    """Keeps every patch; k is always N."""

    def create_parameters(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self.set_grid_size(self.grid_size)

    def forward(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        return x

    def matrix(self) -> Tensor:
        return torch.eye(self.k)[None]

    def check_grid_size(self, grid_size: GridSize) -> None:
        """Every grid fits, because nothing is shortened."""

    def set_grid_size(self, grid_size: GridSize) -> None:
        self.grid_size = grid_size
        self.k = grid_size[0] * grid_size[1]
