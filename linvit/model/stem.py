"""A convolutional stem in place of the patch embedding (Xiao et al. 2021, arXiv 2106.14881).

Convolutions of 3 × 3 pixels with stride 2 halve the image until each patch is one position. A model with a stem learns
faster from scratch than one that maps the pixels of a patch by a single matrix.

The paper normalises over the batch. Here each position is normalised over its channels, so that the result does not
depend on how a batch is split among steps and processes.
"""

from typing import Any

from timm.layers import LayerNorm2d, PatchEmbed, to_2tuple
from timm.models.vision_transformer_hybrid import ConvStem

_SIDES = (2, 4, 8, 16, 32)


class ConvPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed` with convolutions as its `proj`: images (B, C, H, W) to patches (B, N, D).

    Takes the arguments of `PatchEmbed`. A stem for patches of 2^n pixels has n convolutions, with D / 2^(n - 1), …,
    D / 2 and D channels.

    Raises ValueError, here and on a change of size, unless patches are squares of 2, 4, 8, 16 or 32 pixels, D is a
    multiple of 2^(n - 1), and the sides of the image are multiples of the patch's. The patch size cannot change.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        **kwargs: Any,
    ) -> None:
        side, width = to_2tuple(patch_size)
        if side != width or side not in _SIDES:
            raise ValueError(f"stem='conv' needs square patches of 2, 4, 8, 16 or 32 pixels, not {patch_size}")
        depth = side.bit_length() - 1
        if embed_dim % 2 ** (depth - 1):
            raise ValueError(f"stem='conv' with patches of {side} pixels needs a width that {2 ** (depth - 1)} divides")
        super().__init__(img_size, patch_size, in_chans, embed_dim, **kwargs)
        self.proj = ConvStem(
            in_chans,
            depth=depth,
            channels=embed_dim,
            stride=(2,) * depth,
            norm_layer=LayerNorm2d,
            device=kwargs.get("device"),
            dtype=kwargs.get("dtype"),
        )

    def _init_img_size(self, img_size: Any) -> Any:
        side = self.patch_size[0]
        if img_size is not None and any(length % side for length in to_2tuple(img_size)):
            raise ValueError(f"stem='conv' needs image sides that are multiples of the patch's, {side}, not {img_size}")
        return super()._init_img_size(img_size)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the image size. Raises ValueError for another patch size: the number of convolutions depends on it."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"a model with stem='conv' keeps its patches of {self.patch_size[0]} pixels")
        super().set_input_size(img_size)
