"""Positions of a batch's tokens on the patch grid, and how projection accounts for masked and dropped patches.

A key-padding mask hides patches, image by image. Row i of E then covers the share

    s_i = Σ_j |E_ij| m_j / Σ_j |E_ij|        m_j = 1 for a patch that is present, 0 for a masked or dropped one

of its mass. This changes the row's key in three ways:

- Key and value are projected from the present patches and divided by s_i, so a pooling cell averages its present
  patches. The absolute mass of the row does not change, so the keys of signed rows (`dct`, `random`) stay bounded.
- The key stands for n s_i / Σ_i s_i of the n present patches instead of N/k, and its scores carry the logarithm of
  that number. All projected keys together stand for n patches, as in full attention.
- If s_i = 0, the key is hidden.

If E and F differ, a key has the geometric mean of their shares. For kinds that reduce tokens, s_i is the share of the
cell's area, and the projection itself leaves absent patches out. If an image has no token to attend to, none of its
keys is hidden.

Patch dropout without a mask is treated as the average over random subsets: every row is multiplied by N/n and stands
for n/k patches. With a mask, dropped patches count as masked.

timm's transformer blocks get a `layout` keyword here, which passes the positions to their attention layer. It is an
argument and not a state of the layer, so a checkpointed block that runs again in the backward pass gets the same layout
as before, and threads can share a model.

B batch, P prefix tokens, N patches of the grid, n patches present, M maps of a projection, C channels, k projected
length.
"""

import contextlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from linvit.model.projections import GridSize, MatrixProjection, Projection


class TokenLayout(NamedTuple):
    """Where a batch's patch tokens lie if they are not the full grid of the model."""

    grid_size: GridSize
    # Indices of the kept patches of each image (B, n); None if all are kept, in order.
    kept: Optional[Tensor] = None  # noqa: UP045  TorchScript reads it


def mask_of_kept(mask: Tensor, layout: TokenLayout, num_prefix_tokens: int) -> Tensor:
    """The part of a full grid's key-padding mask (B or 1, 1, 1, P + N) for the kept tokens: (B, 1, 1, P + n).

    Raises ValueError for a mask of another shape.
    """
    assert layout.kept is not None
    batch, tokens = layout.kept.shape[0], num_prefix_tokens + layout.grid_size[0] * layout.grid_size[1]
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, 1, tokens):
        raise ValueError(
            f"with patch dropout a mask must be a key-padding mask of shape ({batch}, 1, 1, {tokens}), True where a "
            f"token may be attended to; this mask has shape {tuple(mask.shape)}"
        )
    prefix, patches = mask.expand(batch, -1, -1, -1).tensor_split([num_prefix_tokens], dim=3)
    return torch.cat([prefix, patches.gather(3, layout.kept[:, None, None])], dim=3)


class Patches(NamedTuple):
    """The patches of one batch: positions, which are present, and the share of E's and F's rows that they cover."""

    # None for the layer's own grid.
    grid_size: GridSize | None
    num_patches: int
    # Number of tokens, including masked ones.
    num_present: int
    kept: Tensor | None
    # From a mask: True where a patch is present (B, n), and where a prefix token may be attended to (B, P).
    seen: Tensor | None
    prefix_mask: Tensor | None
    # The present share of each row of E and of F (B, M, k, 1); None without a mask.
    key_share: Tensor | None = None
    value_share: Tensor | None = None

    def place(self, tokens: Tensor) -> Tensor:
        """Put patch tokens (B, M, n, C) on the full grid (B, M, N, C), with zeros for masked and dropped ones."""
        if self.seen is not None:
            return self.fill(tokens, 0.0)
        if self.kept is None:
            return tokens
        # The kept patches stand for all, so that the projection equals that of the full image on average.
        return self._scatter(tokens * (self.num_patches / self.num_present), 0.0)

    def fill(self, tokens: Tensor, absent: float) -> Tensor:
        """Put patch tokens (B, M, n, C) on the full grid (B, M, N, C), with `absent` for masked and dropped ones."""
        if self.seen is not None:
            tokens = tokens.masked_fill(~self.seen[:, None, :, None], absent)
        return tokens if self.kept is None else self._scatter(tokens, absent)

    def _scatter(self, tokens: Tensor, absent: float) -> Tensor:
        assert self.kept is not None
        index = self.kept[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3])
        empty = tokens.new_full((*tokens.shape[:2], self.num_patches, tokens.shape[3]), absent)
        return empty.scatter(2, index, tokens)

    def project(self, projection: Projection, on_grid: Tensor, share: Tensor | None) -> Tensor:
        """Project tokens on the grid (B, 1 or M, N, C) → (B, M, k, C); rows of E are divided by their present share."""
        reduced: Tensor = projection(on_grid, self.grid_size)
        if share is None or not isinstance(projection, MatrixProjection):
            return reduced
        return reduced / share.masked_fill(share == 0, 1.0).to(reduced.dtype)

    def row_sums(self, projection: Projection, like: Tensor, share: Tensor | None) -> Tensor:
        """The factors of the bias of Wk or Wv: E1 (B or 1, M, k, 1), or ones if the tokens are reduced."""
        if not isinstance(projection, MatrixProjection):
            return like.new_ones(1, 1, projection.k, 1)
        if self.seen is None and self.kept is None:
            return projection.row_sums(like, self.grid_size)
        ones = self.place(like.new_ones(like.shape[0], 1, self.num_present, 1))
        return self.project(projection, ones, share)

    def log_patches_per_key(self) -> Tensor | None:
        """log of the number of present patches that each projected key stands for (B, M, 1, k); None without a mask.

        It is -∞ for a key that covers no present patch.
        """
        if self.seen is None or self.key_share is None or self.value_share is None:
            return None
        share = self.key_share
        if self.value_share is not share:
            product = share * self.value_share
            # The square root has no gradient at 0.
            share = product.masked_fill(product == 0, 1.0).sqrt().masked_fill(product == 0, 0.0)
        num_seen = self.seen.sum(1).clamp(min=1)[:, None, None, None]
        live_keys = share.sum(2, keepdim=True)
        patches = share * (num_seen / live_keys.masked_fill(live_keys == 0, 1.0))
        return patches.masked_fill(share == 0, 1.0).log().masked_fill(share == 0, -torch.inf).mT


def find_patches(
    x: Tensor, own_grid: GridSize, num_prefix_tokens: int, layout: TokenLayout | None, mask: Tensor | None
) -> Patches:
    """Describe where the patches of tokens `x` (B, P + n, D) lie, in a layer whose own grid is `own_grid`.

    Raises ValueError if they do not fit the grid, and for a mask that is not a key-padding mask.
    """
    present = x.shape[1] - num_prefix_tokens
    grid_size = own_grid if layout is None else layout.grid_size
    num_patches = grid_size[0] * grid_size[1]
    kept = None if layout is None else layout.kept
    if kept is None and present != num_patches:
        raise ValueError(
            f"{present} patch tokens do not fill the {grid_size[0]}×{grid_size[1]} grid of this attention layer: "
            f"call set_input_size() or build the model with dynamic_img_size=True"
        )
    seen, prefix_mask = None, None
    if mask is not None:
        prefix_mask, seen = _split_key_padding_mask(mask, x, num_prefix_tokens)
    return Patches(
        grid_size=None if grid_size == own_grid else grid_size,
        num_patches=num_patches,
        num_present=present,
        kept=kept,
        seen=seen,
        prefix_mask=prefix_mask if num_prefix_tokens else None,
    )


def read_patches(
    x: Tensor,
    key_proj: Projection,
    value_proj: Projection,
    num_prefix_tokens: int,
    layout: TokenLayout | None,
    mask: Tensor | None,
) -> Patches:
    """Describe the patches of tokens `x` (B, P + n, D) and the share of E's and F's rows that they cover.

    Raises ValueError if they do not fit the grid or the mask.
    """
    patches = find_patches(x, key_proj.grid_size, num_prefix_tokens, layout, mask)
    if patches.grid_size is not None:
        key_proj.check_grid_size(patches.grid_size)
    if patches.seen is None:
        return patches
    key_share = _present_share(key_proj, patches, x)
    value_share = key_share if value_proj is key_proj else _present_share(value_proj, patches, x)
    return patches._replace(key_share=key_share, value_share=value_share)


def _present_share(projection: Projection, patches: Patches, x: Tensor) -> Tensor:
    assert patches.seen is not None
    # Half precision would round a sum over all patches. Autocast does not know meta tensors.
    dtype = torch.promote_types(x.dtype, torch.float32)
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        present = patches.place(patches.seen[:, None, :, None].to(dtype))
        mass = projection.row_mass(present, patches.grid_size)
        full_mass = projection.row_mass(present.new_ones(1, 1, patches.num_patches, 1), patches.grid_size)
        return mass / full_mass.masked_fill(full_mass == 0, 1.0)


def _split_key_padding_mask(mask: Tensor, x: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """The prefix (B, P) and patch (B, n) parts of a boolean mask (B or 1, 1, 1, T)."""
    batch, tokens = x.shape[:2]
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1:] == (1, 1, tokens)
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"Linformer attention takes a boolean key-padding mask of shape ({batch}, 1, 1, {tokens}), True where a "
            f"token may be attended to; this mask is {mask.dtype} of shape {tuple(mask.shape)}. A mask that differs "
            f"between queries cannot be applied to projected keys"
        )
    rows = mask[:, 0, 0].expand(batch, -1)
    return rows[:, :num_prefix_tokens], rows[:, num_prefix_tokens:]


class LayoutBlock(Block):
    """timm's `Block`: normalisation before attention and MLP."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor] = None,  # noqa: UP045
        is_causal: bool = False,
        layout: Optional[TokenLayout] = None,  # noqa: UP045
    ) -> Tensor:
        y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal, layout=layout)
        x = x + self.drop_path1(self.ls1(y))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class LayoutResPostBlock(ResPostBlock):
    """timm's `ResPostBlock`: normalisation after attention and MLP."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor] = None,  # noqa: UP045
        is_causal: bool = False,
        layout: Optional[TokenLayout] = None,  # noqa: UP045
    ) -> Tensor:
        x = x + self.drop_path1(self.norm1(self.attn(x, attn_mask=attn_mask, is_causal=is_causal, layout=layout)))
        x = x + self.drop_path2(self.norm2(self.mlp(x)))
        return x


_WITH_LAYOUT: dict[Any, type[nn.Module]] = {Block: LayoutBlock, ResPostBlock: LayoutResPostBlock}


def with_layout(block_fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Replace timm's `Block` or `ResPostBlock` by one that takes `layout`; every other block is returned unchanged."""
    if isinstance(block_fn, partial):
        return partial(with_layout(block_fn.func), *block_fn.args, **block_fn.keywords)
    return _WITH_LAYOUT.get(block_fn, block_fn)


def takes_layout(block: nn.Module) -> bool:
    """Whether the block's `forward` has a `layout` keyword."""
    return "layout" in inspect.signature(block.forward).parameters
