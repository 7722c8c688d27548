"""A depth-wise convolution of the patch tokens beside attention, for the detail that projected keys average away.

    y = Attention(x) + Conv(x)        x: the normalised patch tokens on their grid

In JetViT (arXiv 2605.26636), such a branch helps a linearised ViT more than any other single change. Linformer has
none, so it is off by default. It starts at zero: until it is trained, the layer's outputs do not change.

B batch, P prefix tokens, N patches of the grid, n patches present, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linvit.model.projections import GridSize
from linvit.model.tokens import Patches


class LocalConv(nn.Module):
    """Convolves each channel of the patch tokens with a square kernel: (B, P + n, D) to (B, n, D).

    Patches outside the image, masked patches and dropped patches are zeros. Prefix tokens are not convolved.

    Args:
        dim: width D of the tokens.
        size: side of the kernel in patches, odd.
        grid_size: (H, W) of the patch grid, N = H·W.

    Raises ValueError if `size` is not an odd number of at least 3.
    """

    def __init__(
        self,
        dim: int,
        *,
        size: int,
        grid_size: GridSize,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if type(size) is not int or size < 3 or size % 2 == 0:
            raise ValueError(f"local={size!r} is not a kernel size: give an odd number of patches, such as 3, or None")
        self.size = size
        self.grid_size = grid_size
        self.weight = nn.Parameter(torch.zeros(dim, 1, size, size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, patches: Patches) -> Tensor:
        tokens = x[:, x.shape[1] - patches.num_present :]
        on_grid = patches.fill(tokens[:, None], 0.0).squeeze(1)  # (B, N, D)
        image = on_grid.unflatten(1, patches.grid_size or self.grid_size).permute(0, 3, 1, 2)  # channels last
        y = F.conv2d(image, self.weight, padding=self.size // 2, groups=self.weight.shape[0]).flatten(2).mT
        return y if patches.kept is None else y.gather(1, patches.kept[:, :, None].expand(-1, -1, y.shape[2]))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, size={self.size}, grid_size={self.grid_size}"
