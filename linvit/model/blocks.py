"""timm's transformer blocks with a `layout` keyword, which tells the attention layer where the tokens lie.

The layout is an argument and not a state of the attention layer. A checkpointed block that runs again in the backward
pass therefore gets the same layout as before, and threads that share a model do not disturb each other.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from linvit.model.tokens import TokenLayout


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
