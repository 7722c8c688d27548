"""What hand-written code paths may do when operations run as they are called, and how they go through tokens in runs.

Fresh memory is paid for page by page on a CPU, and cache is small: where each token is computed alone, a run of them at
a time costs less than all at once.
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
    """Whether `x` is an ordinary tensor: a subclass (quantised, distributed) may support only what a layer calls."""
    return type(x) in _PLAIN_TENSORS


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer and nothing else, so that its weight may be read instead of calling it.

    False for subclasses (adapters, quantised layers), for layers with hooks, and where weight or bias is a tensor
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

    False while compiled, exported or traced, in torch.func's transforms and in forward-mode differentiation.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or in_forward_mode()
    )


def in_forward_mode() -> bool:
    """Whether derivatives may be computed along with the values: dual numbers, `torch.func.jvp`."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts `x` to before a product; None where it is off, or lets `x` be."""
    kind = x.device.type
    # Meta tensors know of no autocast. Not `is_autocast_available`, at which compiling would break off.
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast_once(x: Tensor) -> Tensor:
    """`x` as autocast's products take it, where each of several products would cast it for itself."""
    dtype = autocast_dtype(x) if runs_eagerly() else None
    return x if dtype is None else x.to(dtype)


def goes_in_runs(x: Tensor) -> bool:
    """Whether going through tokens in runs is for `x`: on a CPU, without a gradient, in one precision."""
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and is_plain_tensor(x)
        and runs_eagerly()
    )


def equal_runs(total: int, wanted: int) -> Iterator[slice]:
    """0 … total in runs of about `wanted`, as equal as can be: a last one of a few tokens would be slow."""
    length = run_length(total, wanted)
    for start in range(0, total, length):
        yield slice(start, min(start + length, total))


def run_length(total: int, wanted: int) -> int:
    """The length of the longest of `equal_runs`."""
    number = max(1, round(total / max(1, wanted)))
    return max(1, -(-total // number))


def apply_in_runs(function: Callable[[Tensor, slice], Tensor], x: Tensor, wanted: int) -> Tensor:
    """`function(x[images], images)` of tokens (B, T, D) → (B, T, D), about `wanted` tokens at a time.

    Only where each token's result depends on no other token, and no gradient is wanted.
    """
    B, T, _ = x.shape
    if run_length(B * T, wanted) == B * T:
        return function(x, slice(None))
    out = torch.empty_like(x)
    for images in equal_runs(B, wanted // max(T, 1)):
        for tokens in equal_runs(T, wanted):
            out[images, tokens] = function(x[images, tokens], images)
    return out
