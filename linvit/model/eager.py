"""When the hand-written code paths may run, and how they process tokens in chunks on a CPU.

Layers here replace some of PyTorch's and timm's code by their own. That code reads weights directly and writes into
buffers, so it is for plain tensors, eager execution and reverse-mode derivatives. Everything else takes the usual path.

On a CPU, fresh memory is paid for page by page and the cache is small. Where each token is computed on its own, a chunk
of tokens at a time is faster than all at once.

B batch, T tokens, D width.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

HALF_PRECISIONS = (torch.bfloat16, torch.float16)

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
    return (
        type(module) is nn.Linear
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
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
    """The length of the longest of `equal_chunks`."""
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
