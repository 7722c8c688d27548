"""The fixed random matrix of the Johnson-Lindenstrauss lemma (Wang et al. 2020, Theorem 2), never trained."""

import torch
from torch import Tensor, nn

from linvit.model.projections.base import MatrixProjection, register_projection
from linvit.model.projections.grid import GridSize, remap_grid
from linvit.model.projections.linear import project_dense


@register_projection("random")
class RandomProjection(MatrixProjection):
    """E is a buffer (M, K, H, W) drawn from N(0, 1/k) for every `init`; it is saved with the model."""

    weight: Tensor

    def create_parameters(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        shape = (self.num_maps, self.k, *self.grid_size)
        self.register_buffer("weight", torch.empty(shape, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.k**-0.5)

    def forward(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        return project_dense(x, self.weight if grid_size is None else remap_grid(self.weight, grid_size))

    def row_mass(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        weight = self.weight if grid_size is None else remap_grid(self.weight, grid_size)
        return project_dense(x, weight.abs().to(x.dtype))

    def matrix(self) -> Tensor:
        return self.weight.flatten(2)

    def remap_weight(self, name: str, weight: Tensor, grid_size: GridSize) -> Tensor:
        return remap_grid(weight, grid_size)
