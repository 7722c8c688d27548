"""The paper's learned k × N matrix (Wang et al. 2020, Eq. 7), stored on the grid so that it can change size."""

import torch
from torch import Tensor, nn

from linvit.model.projections.base import MatrixProjection, register_projection
from linvit.model.projections.grid import GridSize, remap_grid, tile_rows


def project_dense(x: Tensor, weight: Tensor) -> Tensor:
    """E x for E (M, K, H, W) and x (B, M or 1, H·W, C): (B, M, K, C). A single x is used for all maps."""
    weight = weight.flatten(2)  # (M, K, N)
    if x.shape[1] == 1:
        # One product for all maps, without a copy of x per map or of E per image.
        y = torch.einsum("kn,bnc->bkc", weight.flatten(0, 1), x.squeeze(1))
        return y.unflatten(1, weight.shape[:2])
    return torch.einsum("mkn,bmnc->bmkc", weight, x)


@register_projection("linear")
class LinearProjection(MatrixProjection):
    """E is a parameter (M, K, H, W) of k·N numbers per map."""

    def create_parameters(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        shape = (self.num_maps, self.k, *self.grid_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.init == "jl":
            nn.init.normal_(self.weight, std=self.k**-0.5)
            return
        nn.init.normal_(self.weight, std=self.pool_noise * self.k / (self.grid_size[0] * self.grid_size[1]))
        self.weight.add_(tile_rows(self.k, self.grid_size, device=self.weight.device, dtype=self.weight.dtype))

    def forward(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        return project_dense(x, self.weight if grid_size is None else remap_grid(self.weight, grid_size))

    def row_mass(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        weight = self.weight if grid_size is None else remap_grid(self.weight, grid_size)
        return project_dense(x, weight.abs().to(x.dtype))

    def matrix(self) -> Tensor:
        return self.weight.flatten(2)

    def remap_weight(self, name: str, weight: Tensor, grid_size: GridSize) -> Tensor:
        return remap_grid(weight, grid_size)
