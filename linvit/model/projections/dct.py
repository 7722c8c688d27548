"""The k lowest cosine modes of the image: a fixed low-pass filter.

Mode (u, v) is the density c_u c_v cos(πut) cos(πvs) on the unit square, integrated over every patch; c = 1 for 0, else
√2. The modes with the least (u/H)² + (v/W)² are used. Row 0 is the mean, and rows are orthogonal. For an image that is
constant on the patches of a grid, a grid twice as fine gives the same keys if it uses the same modes, which holds for k
up to π/4 · N.
"""

import math

import torch
from torch import Tensor

from linvit.model.projections.base import MatrixProjection, register_projection
from linvit.model.projections.grid import GridSize
from linvit.model.projections.separable import project_separable


@register_projection("dct")
class CosineProjection(MatrixProjection):
    """Rows of E are 2-D cosine modes. No parameters. Multiply-adds per channel are about N·√k instead of N·k."""

    def forward(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        modes_h, modes_w, order = self._modes(grid_size or self.grid_size, x.device, x.dtype)
        return project_separable(x, modes_h[None], modes_w[None]).index_select(2, order)

    def row_mass(self, x: Tensor, grid_size: GridSize | None = None) -> Tensor:
        modes_h, modes_w, order = self._modes(grid_size or self.grid_size, x.device, x.dtype)
        return project_separable(x, modes_h.abs()[None], modes_w.abs()[None]).index_select(2, order)

    def matrix(self) -> Tensor:
        modes_h, modes_w, order = self._modes(self.grid_size, torch.device("cpu"), torch.float64)
        return torch.kron(modes_h, modes_w)[None, order]

    def _modes(self, grid_size: GridSize, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Modes along each axis, (U, H) and (V, W), and the indices of the k lowest of their U·V products, in order."""
        height, width = grid_size
        # A quarter ellipse of this radius holds at least k modes: the unit squares at its grid points cover it.
        radius = math.sqrt(4 * self.k / (math.pi * height * width))
        num_h, num_w = (size if radius > 1 else min(size, int(size * radius) + 1) for size in grid_size)
        # With integers, equal frequencies compare equal, and a stable sort orders them by (u, v).
        if torch.compiler.is_exporting() and isinstance(height, int) and isinstance(width, int):
            # As a constant, because ONNX has no stable sort.
            energies = [(u * width) ** 2 + (v * height) ** 2 for u in range(num_h) for v in range(num_w)]
            order = torch.tensor(sorted(range(len(energies)), key=energies.__getitem__)[: self.k], device=device)
        else:
            u = torch.arange(num_h, device=device)[:, None] * width
            v = torch.arange(num_w, device=device)[None, :] * height
            order = (u.square() + v.square()).flatten().argsort(stable=True)[: self.k]
        modes_h, modes_w = (
            cosine_modes(count, size, device=device, dtype=dtype) for count, size in ((num_h, height), (num_w, width))
        )
        return modes_h, modes_w, order


def cosine_modes(count: int, size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Integrate the modes 0 … count − 1 over each of `size` equal intervals of [0, 1]: (count, size)."""
    mode = torch.arange(count, device=device, dtype=torch.float64)[:, None]
    centre = (torch.arange(size, device=device, dtype=torch.float64) + 0.5) / size
    # ∫ cos(πut) over an interval of width 1/size is its value at the centre times sinc(u / 2·size) / size.
    integrals = (math.pi * mode * centre).cos() * torch.sinc(mode / (2 * size)) / size
    return torch.where(mode == 0, integrals, math.sqrt(2) * integrals).to(dtype)
