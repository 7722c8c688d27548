"""Depthwise convolution with kernel and stride of one cell, then layer norm (Wang et al. 2020, section 4).

This is the paper's "kernel and stride n/k" in two dimensions: k_h × k_w cells, each a weighted sum of its patches, with
one kernel per channel. The kernel is a density on the cell, piecewise constant on s_h × s_w pieces. If the grid differs
from k_h·s_h × k_w·s_w, tokens are first averaged to these pieces by area. So every patch counts even if the stride does
not divide the grid, and the weights never change with the grid. The convolution has no bias, because the norm has one.

Differs from the paper: the tokens are convolved, before Wk and Wv.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.model.projections.avgpool import average_cells
from linvit.model.projections.base import Projection, register_projection
from linvit.model.projections.grid import GridSize, averaging_matrix, factor_pair
from linvit.model.projections.separable import project_separable

NORM_EPS = 1e-6


@register_projection("conv")
class ConvProjection(Projection):
    """Kernels `weight` (M, C, s_h, s_w), initially with one piece per patch; layer norm's `gamma` and `beta` (M, C)."""

    def create_parameters(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        if self.dim is None:
            raise ValueError(
                "projection 'conv' has one kernel per channel: build it with dim=, the width of the tokens"
            )
        cells, (height, width) = factor_pair(self.k, self.grid_size), self.grid_size
        kernel = -(-height // cells[0]), -(-width // cells[1])
        self.weight = nn.Parameter(torch.empty(self.num_maps, self.dim, *kernel, device=device, dtype=dtype))
        self.gamma = nn.Parameter(torch.empty(self.num_maps, self.dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(self.num_maps, self.dim, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        pieces = self.weight.shape[2] * self.weight.shape[3]
        if self.init == "jl":
            nn.init.normal_(self.weight, std=pieces**-0.5)
        else:
            nn.init.normal_(self.weight, mean=1 / pieces, std=self.pool_noise / pieces)
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        grid_size = grid_size or self.grid_size
        cells, kernel = factor_pair(self.k, grid_size), self.weight.shape[2:]
        pieces = cells[0] * kernel[0], cells[1] * kernel[1]
        if pieces != grid_size:
            average_h = averaging_matrix(pieces[0], grid_size[0], device=x.device, dtype=x.dtype)
            average_w = averaging_matrix(pieces[1], grid_size[1], device=x.device, dtype=x.dtype)
            x = project_separable(x, average_h[None], average_w[None])
        image = x.squeeze(1).unflatten(1, pieces).permute(0, 3, 1, 2)  # (B, C, H, W), channels last
        filters = self.weight.transpose(0, 1).flatten(0, 1)[:, None]  # (C·M, 1, s_h, s_w)
        y = F.conv2d(image, filters, stride=kernel, groups=self.weight.shape[1])
        y = y.unflatten(1, (-1, self.num_maps)).flatten(3).permute(0, 2, 3, 1)  # (B, M, K, C)
        return F.layer_norm(y, y.shape[-1:], eps=NORM_EPS) * self.gamma[:, None] + self.beta[:, None]

    def row_mass(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        return average_cells(x, self.k, grid_size or self.grid_size)

    def check_grid_size(self, grid_size: GridSize) -> None:
        super().check_grid_size(grid_size)
        factor_pair(self.k, grid_size)

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Take over a checkpoint's number of pieces, so that its kernels compute what they were trained for."""
        if "weight" in state and state["weight"].shape[2:] != self.weight.shape[2:]:
            shape = (*self.weight.shape[:2], *state["weight"].shape[2:])
            self.weight = nn.Parameter(self.weight.new_empty(shape), requires_grad=self.weight.requires_grad)
