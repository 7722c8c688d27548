"""Record the attention of every layer of a Vision Transformer on an image.

Queries, keys and values are recorded where they enter scaled_dot_product_attention. They are then exactly what the
softmax sees, after biases, normalisation, rotary embedding and masks, and nothing of the model is computed twice. Each
head has one matrix per image. A Linformer layer attends to projected keys and mixes the values by F (E if they are
shared), so its matrix is P̄ F (T × T), where P̄ (T × K) is the softmax and prefix tokens stay as they are. It is never
formed: rows of it are products of a vector with P̄, then with F.

T tokens, P prefix tokens, N patches, K keys, k projected length, H heads, d head width, M maps, C columns of a matrix.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import HybridEmbed, PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from linvit.model.mlp import LeanMlp
from linvit.model.projected import ProjectedAttention
from linvit.model.projections import MatrixProjection, Projection

# Entries of a block of rows: 64 MiB in single precision.
BLOCK_ENTRIES = 2**24


class AttentionMatrix:
    """softmax(Q Kᵀ · scale + bias) W, (T, C), computed a block of rows at a time; the whole matrix is never stored.

    The softmax is taken in single precision, or in double if the queries are in double.

    Args:
        queries: Q (T, d).
        keys: K (K, d).
        scale: factor of the scores.
        bias: added to the scores, (1 or T, K); None adds nothing.
        mixing: W (K, C), by which the softmax is multiplied; None means the identity, so that C = K.
    """

    def __init__(
        self, queries: Tensor, keys: Tensor, *, scale: float, bias: Tensor | None = None, mixing: Tensor | None = None
    ) -> None:
        self.dtype = torch.promote_types(queries.dtype, torch.float32)
        self.device = queries.device
        self._queries = queries.to(self.dtype) * scale
        self._keys = keys.to(self.dtype)
        self._bias = None if bias is None else bias.to(self.dtype)
        self._mixing = None if mixing is None else mixing.to(self.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        columns = self._keys.shape[0] if self._mixing is None else self._mixing.shape[1]
        return self._queries.shape[0], columns

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of t rows from first to last: the slice of rows, and their values (t, C)."""
        num_rows = self._queries.shape[0]
        length = max(1, BLOCK_ENTRIES // self._keys.shape[0])
        for start in range(0, num_rows, length):
            rows = slice(start, min(start + length, num_rows))
            yield rows, self._rows(rows)

    def _rows(self, rows: slice) -> Tensor:
        scores = self._queries[rows] @ self._keys.mT
        if self._bias is not None:
            scores += self._bias if self._bias.shape[0] == 1 else self._bias[rows]
        attention = scores.softmax(dim=-1)
        return attention if self._mixing is None else attention @ self._mixing

    def __matmul__(self, x: Tensor) -> Tensor:
        """The matrix times x (C, r): (T, r)."""
        return torch.cat([block @ x for _, block in self.row_blocks()])

    def transposed_matmul(self, y: Tensor) -> Tensor:
        """The transposed matrix times y (T, r): (C, r)."""
        out = y.new_zeros(self.shape[1], y.shape[1])
        for rows, block in self.row_blocks():
            out.addmm_(block.mT, y[rows])
        return out

    def gram(self) -> Tensor:
        """The transposed matrix times the matrix, (C, C), in double precision."""
        out = torch.zeros(self.shape[1], self.shape[1], dtype=torch.float64, device=self.device)
        for _, block in self.row_blocks():
            precise = block.double()
            out.addmm_(precise.mT, precise)
        return out

    def energy(self) -> float:
        """The sum of squares of all entries, which equals that of all singular values."""
        return sum(block.double().square().sum().item() for _, block in self.row_blocks())


@dataclass
class LayerAttention:
    """Queries (1, H, T, d), keys and values (1, H, K, d) of one layer, and what else determines its attention.

    Attributes:
        bias: added to the scores, (1, 1 or H, 1 or T, K) or None.
        scale: factor of the scores.
        outputs: what attention returned, (1, H, T, d) in parts of the queries; gradients are taken with respect to it.
        projection: F of a Linformer layer, on `grid_size`; None for ordinary attention.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor | None
    scale: float
    outputs: list[Tensor]
    grid_size: tuple[int, int]
    projection: Projection | None = None

    @property
    def num_heads(self) -> int:
        return self.queries.shape[1]

    def matrix(self, head: int, *, mixing: Tensor | None = None, rows: Tensor | slice = slice(None)) -> AttentionMatrix:
        """P̄ of one head (T, K), or some of its rows, multiplied by `mixing` (M, K, C) if that is given."""

        def of_head(heads: Tensor | None) -> Tensor | None:
            return None if heads is None else heads[head if heads.shape[0] > 1 else 0]

        bias = of_head(None if self.bias is None else self.bias[0])
        return AttentionMatrix(
            self.queries[0, head, rows],
            self.keys[0, head],
            scale=self.scale,
            bias=bias if bias is None or bias.shape[0] == 1 else bias[rows],
            mixing=of_head(mixing),
        )

    def to_tokens(self, weights: Tensor) -> Tensor:
        """Spread weights of the keys (H, K) over the tokens that they stand for, by F: (H, T)."""
        if self.projection is None:
            return weights
        prefix = weights.shape[1] - self.projection.k
        own, projected = weights.split([prefix, self.projection.k], dim=1)
        by_map = projected[:, None] if self.projection.num_maps == 1 else projected[None]
        patches = spread(self.projection, by_map, self.grid_size)
        return torch.cat([own, patches.reshape(len(weights), -1)], dim=1)


def spread(projection: Projection, weights: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Spread weights of projected keys (R, M, k) over the patches: (R, M, N), the weights times E.

    For kinds that reduce tokens (`maxpool`, `conv`), E is the share of each patch in the area of a key's cell.
    """
    patches = weights.new_zeros(weights.shape[0], projection.num_maps, grid_size[0] * grid_size[1], 1)
    apply = projection if isinstance(projection, MatrixProjection) else projection.row_mass
    # A product with Eᵀ is the gradient of a product with E, which each kind computes in its own way.
    with torch.enable_grad():
        patches.requires_grad_()
        rows = apply(patches.to(_dtype(projection, weights)), grid_size).expand(-1, projection.num_maps, -1, -1)
        (spread,) = torch.autograd.grad(rows, patches, weights[..., None].to(rows.dtype))
    return spread.squeeze(-1)


def _dtype(projection: Projection, weights: Tensor) -> torch.dtype:
    return next((tensor.dtype for tensor in [*projection.parameters(), *projection.buffers()]), weights.dtype)


class Vit(nn.Module):
    """The parts of a Vision Transformer (timm's or linvit's) that are used here, for the type checker alone."""

    blocks: nn.Sequential
    patch_embed: PatchEmbed | HybridEmbed
    embed_dim: int


def as_vit(model: nn.Module) -> Vit:
    """The model itself; raises ValueError unless it is a Vision Transformer, with patches and blocks of attention."""
    blocks, embedding = getattr(model, "blocks", None), getattr(model, "patch_embed", None)
    has_grid = isinstance(embedding, PatchEmbed | HybridEmbed)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not has_grid:
        raise ValueError(
            f"{type(model).__name__} is not a Vision Transformer with patch_embed and blocks: its attention, if any, "
            "is not one matrix per layer and head"
        )
    return cast(Vit, model)


def capture_attention(model: Vit, image: Tensor) -> tuple[list[LayerAttention], Tensor]:
    """The attention of each block on one image (1, 3, height, width), and the model's output.

    The model runs in evaluation mode and is restored afterwards. The recorded tensors are part of the graph of the
    output where gradients are enabled.

    Raises ValueError, naming the block, if it does not attend once to all tokens through
    `scaled_dot_product_attention`, and if the image does not fit the model's grid.
    """
    recorder = _Recorder()
    with _ready_to_capture(model), recorder.watching(model.blocks), recorder:
        output = model(image)
    rows, columns = model.patch_embed.dynamic_feat_size(image.shape[-2:])
    layers = []
    for index, block in enumerate(model.blocks):
        layer = recorder.layer(index, grid_size=(int(rows), int(columns)))
        attention = next((module for module in block.modules() if isinstance(module, ProjectedAttention)), None)
        projections = None if attention is None else attention.projections()
        layer.projection = None if projections is None else projections[1]
        layers.append(layer)
    return layers, output


@dataclass
class _Call:
    """One call of `scaled_dot_product_attention`: its result, then its arguments."""

    result: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class _Recorder(TorchFunctionMode):
    """Records the calls of `scaled_dot_product_attention` in each block, by the block's index."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[int, list[_Call]] = {}
        self._block: int | None = None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and self._block is not None:
            self.calls.setdefault(self._block, []).append(_Call(result, *args, **(kwargs or {})))
        return result

    @contextlib.contextmanager
    def watching(self, blocks: nn.Module) -> Iterator[None]:
        """Keep track of the block that is running."""
        handles = []
        for index, block in enumerate(blocks.children()):
            handles.append(block.register_forward_pre_hook(lambda *_, index=index: self._enter(index)))
            handles.append(block.register_forward_hook(lambda *_: self._enter(None)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, block: int | None) -> None:
        self._block = block

    def layer(self, index: int, *, grid_size: tuple[int, int]) -> LayerAttention:
        """The attention of a block, as if it were ordinary; raises ValueError unless it is one matrix per head."""
        calls = self.calls.get(index, [])
        if not calls:
            raise ValueError(f"blocks.{index} does not attend by queries and keys: this model has no attention matrix")
        first = calls[0]
        if first.queries.shape[0] != 1:
            raise ValueError(f"blocks.{index} attends within {first.queries.shape[0]} windows, not to the whole image")
        # A layer may call it for a chunk of queries at a time, each with the same keys.
        if any(call.keys.data_ptr() != first.keys.data_ptr() for call in calls) or first.is_causal:
            raise ValueError(f"blocks.{index} attends {len(calls)} times, or causally: its attention is not one matrix")
        return LayerAttention(
            queries=torch.cat([call.queries for call in calls], dim=2),
            keys=first.keys,
            values=first.values,
            bias=_additive(first.attn_mask, first.queries),
            scale=first.queries.shape[-1] ** -0.5 if first.scale is None else first.scale,
            outputs=[call.result for call in calls],
            grid_size=grid_size,
        )


def _additive(mask: Tensor | None, queries: Tensor) -> Tensor | None:
    """The mask as a bias of the scores: -inf where a boolean mask is False."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=queries.dtype).masked_fill(~mask, -torch.inf)


@contextlib.contextmanager
def _ready_to_capture(model: nn.Module) -> Iterator[None]:
    """A context of evaluation mode, fused attention, no recomputed blocks, and an order that forms queries."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    settings: list[tuple[Any, str, Any]] = []
    for module in modules:
        if isinstance(getattr(module, "fused_attn", None), bool):
            settings.append((module, "fused_attn", True))
        # A block that the backward pass recomputes would attend again, after the settings here are restored.
        if getattr(module, "grad_checkpointing", False) is True:
            settings.append((module, "grad_checkpointing", False))
        if isinstance(module, LeanMlp):
            settings.append((module, "recompute", "activation"))
        if isinstance(module, ProjectedAttention):
            projections = module.projections()
            # The folded order forms no queries.
            is_matrix = projections is not None and isinstance(projections[0], MatrixProjection)
            settings.append((module, "order", "per_head" if is_matrix else "associative"))
    before = [(module, name, getattr(module, name)) for module, name, _ in settings]
    try:
        model.eval()
        for module, name, value in settings:
            setattr(module, name, value)
        yield
    finally:
        for module, mode in zip(modules, training):
            module.training = mode
        for module, name, value in before:
            setattr(module, name, value)
