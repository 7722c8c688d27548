"""E = E_h ⊗ E_w: every key weights the rows and the columns of the grid separately.

This takes k_h·H + k_w·W parameters instead of k·N, and N·k_h multiply-adds per channel instead of N·k. k_h and k_w are
fixed when the weights are created and do not change with the grid.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from linvit.model.projections.base import MatrixProjection, register_projection
from linvit.model.projections.grid import GridSize, averaging_matrix, check_cells, factor_pair, remap_axis


def project_separable(x: Tensor, weight_h: Tensor, weight_w: Tensor) -> Tensor:
    """(E_h ⊗ E_w) x for x (B, M, H·W, C), E_h (M, k_h, H), E_w (M, k_w, W): (B, M, k_h·k_w, C).

    Either M may be 1, for one map on all of x or one x for all maps.
    """
    (M, k_h, H), W = weight_h.shape, weight_w.shape[2]
    if M == 1 and x.shape[1] == 1:
        # The usual case, in the fewest steps. `@` would copy a transposed x to make one product of all images.
        grid = x.reshape(-1, H, W * x.shape[3])
        rows = torch.bmm(weight_h.expand(grid.shape[0], -1, -1), grid)  # (B, k_h, W·C)
        return (weight_w @ rows.view(-1, k_h, W, x.shape[3])).flatten(1, 2)[:, None]
    grid = x.unflatten(2, (H, W)).flatten(3)  # (B, M, H, W·C)
    if x.shape[1] == 1:
        # All maps in one product, because broadcasting would copy x for each.
        rows = (weight_h.flatten(0, 1)[None, None] @ grid).unflatten(2, (M, k_h)).squeeze(1)
    else:
        rows = weight_h[None] @ grid
    rows = rows.unflatten(3, (W, -1))  # (B, M, k_h, W, C)
    return (weight_w[None, :, None] @ rows).flatten(2, 3)


@register_projection("separable")
class SeparableProjection(MatrixProjection):
    """E_h (M, k_h, H) and E_w (M, k_w, W) are parameters; k = k_h · k_w, shaped like the grid."""

    def create_parameters(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        (k_h, k_w), (height, width) = factor_pair(self.k, self.grid_size), self.grid_size
        self.weight_h = nn.Parameter(torch.empty(self.num_maps, k_h, height, device=device, dtype=dtype))
        self.weight_w = nn.Parameter(torch.empty(self.num_maps, k_w, width, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for weight in (self.weight_h, self.weight_w):
            _, cells, size = weight.shape
            if self.init == "jl":
                # The product of an entry of E_h and one of E_w then has variance 1/k.
                nn.init.normal_(weight, std=cells**-0.5)
            else:
                nn.init.normal_(weight, std=self.pool_noise * cells / size)
                weight.add_(averaging_matrix(cells, size, device=weight.device, dtype=weight.dtype))

    def forward(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        height, width = self.grid_size if grid_size is None else grid_size
        return project_separable(x, remap_axis(self.weight_h, height), remap_axis(self.weight_w, width))

    def row_mass(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        sizes = self.grid_size if grid_size is None else grid_size
        weights = (remap_axis(weight, size) for weight, size in zip((self.weight_h, self.weight_w), sizes))
        return project_separable(x, *(weight.abs().to(x.dtype) for weight in weights))

    def row_sums(self, like: Tensor, grid_size: GridSize | None = None) -> Tensor:
        # Remapping preserves row sums, so they are the same on every grid.
        sums = self.weight_h.sum(2)[:, :, None] * self.weight_w.sum(2)[:, None]  # (M, k_h, k_w)
        return sums.flatten(1)[None, :, :, None]

    def matrix(self) -> Tensor:
        return torch.einsum("mih,mjw->mijhw", self.weight_h, self.weight_w).flatten(3).flatten(1, 2)

    def check_grid_size(self, grid_size: GridSize) -> None:
        super().check_grid_size(grid_size)
        check_cells((self.weight_h.shape[1], self.weight_w.shape[1]), grid_size)

    def remap_weight(self, name: str, weight: Tensor, grid_size: GridSize) -> Tensor:
        return remap_axis(weight, grid_size[0 if name == "weight_h" else 1])

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Take over a checkpoint's k_h × k_w if it is another factorisation of the same k."""
        if not {"weight_h", "weight_w"} <= state.keys():
            return
        cells = state["weight_h"].shape[1], state["weight_w"].shape[1]
        if cells[0] * cells[1] != self.k or cells[0] == self.weight_h.shape[1]:
            return
        check_cells(cells, self.grid_size)
        for name, num_cells in zip(("weight_h", "weight_w"), cells):
            own = getattr(self, name)
            fitting = own.new_empty(own.shape[0], num_cells, own.shape[2])
            setattr(self, name, nn.Parameter(fitting, requires_grad=own.requires_grad))
