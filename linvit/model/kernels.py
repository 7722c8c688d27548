"""How attention and MLPs are computed: which order of multiplication, in which chunks, by hand or by PyTorch.

**Hand-written paths** read weights directly and write into buffers, so they are for plain tensors, eager execution and
reverse-mode derivatives. Everything else takes PyTorch's and timm's path. On a CPU, every new page of memory costs a
page fault, and the cache is small: where tokens do not depend on each other, a chunk of them at a time is faster than
all at once.

**Linformer attention** can be multiplied out in three orders, which give the same function:

- per head: keys and values of all N tokens, then E and F on them. This is the published order.
- associative: E(XWk + 1bᵀ) = (EX)Wk + (E1)bᵀ: project the tokens to k first, then apply Wk and Wv to k rows only.
- folded: with few keys, scores are X (Wq K̄ᵀ) and the output is P (V̄ Wo): two products of width K·H. Neither queries
  nor per-head outputs are formed.

Projections that are not matrices (`maxpool`, `conv`) reduce the tokens before Wk and Wv: they have no per-head order.

**Fused attention** of many queries to few keys is split on a GPU. Its kernels compute the gradients of keys and values
one block of keys at a time, each over all queries, and a few dozen keys are one block: one block per head and image
leaves most of a GPU idle. Chunks of queries, passed as additional images, give every multiprocessor its own block.
Autograd sums the chunks' gradients of the keys and values that they share.

B batch, T tokens or queries, N patches, D width, H heads, d head width, M maps of a projection (1 or H), k projected
length, K keys (prefix tokens + k), S chunks of c queries.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx.experimental import proxy_tensor
from torch.nn import functional as F

HALF_PRECISIONS = (torch.bfloat16, torch.float16)
# torch.export wraps the modules of a model in which several names lead to one module, as with share="layerwise". The
# name is private, and other versions of torch may lack it.
_EXPORTED_MODULE: Any = getattr(proxy_tensor, "_AttrProxy", ())

# The last two stand for plain tensors while a model is exported.
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


def is_plain_tensor(x: Tensor) -> bool:
    """Whether `x` is an ordinary tensor; a subclass (quantised, distributed) may support only what a layer calls."""
    return type(x) in _PLAIN_TENSORS


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` is an unmodified linear layer, so that its weight may be read instead of calling the layer.

    False for subclasses (adapters, quantised layers), for layers with hooks, and if the weight or bias is a tensor
    subclass (quantised weights in a plain layer).
    """
    base: Any = module
    kind = type(base.get_base()) if isinstance(module, _EXPORTED_MODULE) else type(module)
    return kind is nn.Linear and _is_plain(module)


def _is_plain(module: Any) -> bool:
    return (
        not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and is_plain_tensor(module.weight)
        and (module.bias is None or is_plain_tensor(module.bias))
    )


def runs_eagerly() -> bool:
    """Whether operations run as they are called, with reverse-mode derivatives at most.

    False while compiling, exporting or tracing, inside torch.func's transforms and in forward-mode differentiation.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or in_forward_mode()
    )


def in_forward_mode() -> bool:
    """Whether derivatives may be computed along with the values, by dual numbers or `torch.func.jvp`."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type autocast converts `x` to before a matrix product; None if autocast is off or leaves `x` unchanged."""
    kind = x.device.type
    # Autocast does not know meta tensors. `is_autocast_available` would break the graph when compiling.
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast_once(x: Tensor) -> Tensor:
    """`x` in autocast's type, so that several products do not each convert it."""
    dtype = autocast_dtype(x) if runs_eagerly() else None
    return x if dtype is None else x.to(dtype)


def runs_in_chunks(x: Tensor) -> bool:
    """Whether tokens like `x` should be processed in chunks: on a CPU, without a gradient, in one precision."""
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and is_plain_tensor(x)
        and runs_eagerly()
    )


def equal_chunks(total: int, wanted: int) -> Iterator[slice]:
    """Slices of 0 … total with about `wanted` elements each, as equal as possible: a short last one would be slow."""
    length = chunk_length(total, wanted)
    for start in range(0, total, length):
        yield slice(start, min(start + length, total))


def chunk_length(total: int, wanted: int) -> int:
    """The longest chunk of `equal_chunks`."""
    number = max(1, round(total / max(1, wanted)))
    return max(1, -(-total // number))


def apply_in_chunks(function: Callable[[Tensor, slice], Tensor], x: Tensor, wanted: int) -> Tensor:
    """Apply `function(x[images], images)` to tokens (B, T, D) → (B, T, D), about `wanted` tokens at a time.

    Each token's result must not depend on other tokens, and no gradient is recorded.
    """
    B, T, _ = x.shape
    if chunk_length(B * T, wanted) == B * T:
        return function(x, slice(None))
    out = torch.empty_like(x)
    for images in equal_chunks(B, wanted // max(T, 1)):
        for tokens in equal_chunks(T, wanted):
            out[images, tokens] = function(x[images, tokens], images)
    return out


Order = Literal["per_head", "associative", "folded"]


def choose_order(
    *,
    dim: int,
    num_heads: int,
    num_keys: int,
    num_patches: int,
    k: int,
    num_maps: int,
    foldable: bool,
    is_matrix: bool = True,
) -> Order:
    """The cheapest order by multiply-adds per patch.

    | order       | keys and values      | queries, attention, output |
    |-------------|----------------------|----------------------------|
    | per head    | 2 D² + 2 D k         | 2 D² + 2 D K               |
    | associative | 2 D k M              | 2 D² + 2 D K               |
    | folded      | 2 D k M              | 2 D K H + 2 D² K / N       |

    The last term is the cost of folding the weights into the keys, once per image. It counts twice, because products
    this small ran at half speed on the CPU where they were measured.
    """
    folding = num_keys * num_heads + 2 * dim * num_keys / num_patches
    if foldable and folding <= dim + num_keys:
        return "folded"
    return "associative" if k * num_maps <= dim + k or not is_matrix else "per_head"


def keeps_scores_on_chip(x: Tensor) -> bool:
    """Whether fused attention of `x` costs almost nothing, as it does in half precision on a GPU.

    Folding does not pay there: the multiply-adds that it saves are not the bottleneck, and it writes scores to memory.
    """
    return x.is_cuda and (autocast_dtype(x) or x.dtype) in HALF_PRECISIONS


# Keys in one block of the kernels' backward passes.
KEYS_PER_BLOCK = 128
# Blocks wanted: about two per multiprocessor of an A100 (108) or H100 (132).
BLOCKS_WANTED = 256
# torch uses cuDNN's kernels from Hopper on, and fewer blocks keep an H100 busy with them. Splitting made forward plus
# backward an eighth slower at 48 blocks, a third faster at 36 and three quarters faster at 6.
CUDNN_BLOCKS_WANTED = 48
# A chunk of fewer queries costs more in the forward pass than it saves in the backward pass.
QUERIES_PER_CHUNK = 512


def split_attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, dropout: float, chunks: int | None = None
) -> Tensor:
    """`scaled_dot_product_attention` of q (B, H, T, d) to k and v (B, H, K, d): (B, H, T, d).

    `bias` (B or 1, H or 1, 1, K) is added to the scores. `chunks` is the number of chunks of queries; by default it
    follows from the size on a GPU if a gradient is needed, and is 1 otherwise.
    """
    B, H, T, _ = q.shape
    if chunks is None:
        wanted = q.is_cuda and torch.is_grad_enabled() and q.requires_grad
        cudnn = wanted and q.dtype in HALF_PRECISIONS and _prefers_cudnn()
        chunks = query_chunks(batch=B, heads=H, queries=T, keys=k.shape[2], cudnn=cudnn) if wanted else 1
    if chunks == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    # Tokens before heads, as the queries lie in memory: splitting copies nothing unless the tokens need padding.
    by_token = q.transpose(1, 2)
    if T % chunks:
        by_token = F.pad(by_token, (0, 0, 0, 0, 0, -T % chunks))
    q = by_token.unflatten(1, (chunks, -1)).flatten(0, 1).transpose(1, 2)  # (B·S, H, c, d)
    k, v = (each[:, None].expand(-1, chunks, -1, -1, -1).flatten(0, 1) for each in (k, v))
    if bias is not None and bias.shape[0] > 1:
        bias = bias.repeat_interleave(chunks, dim=0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return out.transpose(1, 2).unflatten(0, (B, chunks)).flatten(1, 2)[:, :T].transpose(1, 2)


def query_chunks(*, batch: int, heads: int, queries: int, keys: int, cudnn: bool = False) -> int:
    """The number of chunks to split each image's queries into; 1 if there is enough work without splitting."""
    blocks = batch * heads * -(-keys // KEYS_PER_BLOCK)
    if blocks >= (CUDNN_BLOCKS_WANTED if cudnn else BLOCKS_WANTED):
        return 1
    return max(1, min(-(-BLOCKS_WANTED // blocks), queries // QUERIES_PER_CHUNK))


@torch.compiler.assume_constant_result
def _prefers_cudnn() -> bool:
    """Whether torch's fused attention in half precision is cuDNN's on this GPU."""
    return torch.cuda.get_device_capability() >= (9, 0) and torch.backends.cuda.cudnn_sdp_enabled()
