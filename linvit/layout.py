"""Where the tokens of a batch lie on the patch grid, which are there, and what projecting makes of that.

B batch, P prefix tokens, N patches of the grid, n patches present, M maps of a projection, C channels, k projected
length.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from linvit.projections import GridSize, MatrixProjection, Projection


class TokenLayout(NamedTuple):
    """Where a batch's tokens lie when they are not simply the model's whole grid; travels in the mask's place."""

    grid_size: GridSize
    # Indices of the patches that are present (B, n), each image its own; None: all of them, in order.
    kept: Tensor | None = None
    attn_mask: Tensor | None = None


class Patches(NamedTuple):
    """The patches of one batch: where they lie, which are there, and with what weight."""

    # None: the projection's own grid.
    grid_size: GridSize | None
    num_patches: int
    num_present: int
    kept: Tensor | None
    weight: Tensor | None
    prefix_mask: Tensor | None

    def place(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, M, n, C) on the whole grid (B, M, N, C), weighted; dropped ones leave zeros."""
        if self.weight is not None:
            tokens = tokens * self.weight[:, None, :, None]
        if self.kept is None:
            return tokens
        # The kept patches stand for all: on average the projection is that of the whole image.
        return self._scatter(tokens * (self.num_patches / self.num_present), 0.0)

    def fill(self, tokens: Tensor, absent: float) -> Tensor:
        """Patch tokens (B, M, n, C) on the whole grid (B, M, N, C), masked and dropped ones reading `absent`."""
        if self.weight is not None:
            tokens = tokens.masked_fill(self.weight[:, None, :, None] == 0, absent)
        return tokens if self.kept is None else self._scatter(tokens, absent)

    def _scatter(self, tokens: Tensor, absent: float) -> Tensor:
        assert self.kept is not None
        index = self.kept[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3])
        whole = tokens.new_full((*tokens.shape[:2], self.num_patches, tokens.shape[3]), absent)
        return whole.scatter(2, index, tokens)

    def row_sums(self, projection: Projection, like: Tensor) -> Tensor:
        """By what the bias of Wk or Wv is multiplied: E1 (B or 1, M, k, 1), or ones where tokens are reduced."""
        if not isinstance(projection, MatrixProjection):
            return like.new_ones(1, 1, projection.k, 1)
        if self.weight is None and self.kept is None:
            return projection.row_sums(like, self.grid_size)
        ones: Tensor = projection(self.place(like.new_ones(like.shape[0], 1, self.num_present, 1)), self.grid_size)
        return ones


def read_patches(
    x: Tensor, projection: Projection, num_prefix_tokens: int, layout: TokenLayout | None, mask: Tensor | None
) -> Patches:
    """The patches of tokens `x` (B, P + n, D); ValueError where they do not fit the projection's grid or the mask."""
    present = x.shape[1] - num_prefix_tokens
    own_grid = projection.grid_size
    grid_size = own_grid if layout is None else layout.grid_size
    num_patches = grid_size[0] * grid_size[1]
    kept = None if layout is None else layout.kept
    if kept is None and present != num_patches:
        raise ValueError(
            f"{present} patch tokens do not fill the {grid_size[0]}×{grid_size[1]} grid of this attention layer: "
            f"call set_input_size(), or build the model with dynamic_img_size=True"
        )
    if grid_size != own_grid:
        projection.check_grid_size(grid_size)
    weight, prefix_mask = None, None
    if mask is not None:
        prefix_mask, patch_mask = _split_key_padding_mask(mask, x, num_prefix_tokens)
        weight = patch_mask.to(x.dtype)
    return Patches(
        grid_size=None if grid_size == own_grid else grid_size,
        num_patches=num_patches,
        num_present=present,
        kept=kept,
        weight=weight,
        prefix_mask=prefix_mask if num_prefix_tokens else None,
    )


def _split_key_padding_mask(mask: Tensor, x: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """The prefix (B, P) and patch (B, n) parts of a boolean mask (B or 1, 1, 1, T)."""
    batch, tokens = x.shape[:2]
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1:] == (1, 1, tokens)
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"Linformer attention takes a boolean key-padding mask of shape ({batch}, 1, 1, {tokens}), True where a "
            f"token may be attended to; this mask is {mask.dtype} of shape {tuple(mask.shape)}. Masks that differ "
            f"between queries cannot be applied to projected keys"
        )
    rows = mask[:, 0, 0].expand(batch, -1)
    return rows[:, :num_prefix_tokens], rows[:, num_prefix_tokens:]
