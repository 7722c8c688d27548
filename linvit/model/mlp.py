"""The transformer's MLP with less memory traffic: fc2(GELU(fc1(x))), the same function as timm's `Mlp`.

timm's layers keep the hidden activations twice for the backward pass, before and after the GELU: 8 of the 16 widths
that a ViT block keeps per token. On a CPU, the backward pass here recomputes the GELU from its input, which leaves 4.
With `recompute="hidden"` it also recomputes fc1, on a GPU too, which leaves none.

On a CPU, tokens are also processed in chunks whose hidden activations fit the cache, in buffers that are reused. Every
new page of memory costs a page fault, which for long sequences takes longer than the GELU.

B batch, T tokens, D width, D' hidden width, n = B·T rows.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.layers import Mlp, SwiGLU, SwiGLUPacked
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.utils.checkpoint import checkpoint

from linvit.model.kernels import (
    autocast_dtype,
    chunk_length,
    equal_chunks,
    is_plain_linear,
    is_plain_tensor,
    runs_eagerly,
)
from linvit.settings.fields import unknown_choice

# What the backward pass recomputes: only the GELU (on a CPU), or all hidden activations.
Recompute = Literal["activation", "hidden"]

# Hidden activations in one chunk of tokens: 6 MiB in single precision, 1,024 tokens of a ViT-S.
CHUNK_ELEMENTS = 3 * 2**19


@register_notrace_module
class LeanMlp(Mlp):
    """timm's `Mlp` with the same parameters and results, which keeps less for the backward pass.

    This holds for two linear layers, with or without biases, around an exact GELU. Everything else runs as in timm,
    under `torch.utils.checkpoint` if `recompute` is "hidden": another activation, a norm in between, active dropout,
    layers with hooks or replaced by an adapter, and tensor subclasses such as quantised weights. So do compiled and
    exported code, which the compiler fuses, and forward-mode differentiation.
    """

    recompute: Recompute = "activation"

    def forward(self, x: Tensor) -> Tensor:
        needs_grad = torch.is_grad_enabled() and (
            x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        )
        if not self._is_plain(x) or not (x.is_cpu or (needs_grad and self.recompute == "hidden")):
            if needs_grad and self.recompute == "hidden":
                return checkpoint(super().forward, x, use_reentrant=False)
            return super().forward(x)
        inputs: tuple[Any, ...] = (x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        dtype = autocast_dtype(x)
        if dtype is None:
            return self._lean(inputs, needs_grad)
        with torch.autocast(x.device.type, enabled=False):
            return self._lean(tuple(None if each is None else each.to(dtype) for each in inputs), needs_grad)

    def _lean(self, inputs: tuple[Any, ...], needs_grad: bool) -> Tensor:
        if not needs_grad:
            return _forward(*inputs, hidden=None)
        out: Tensor = _LeanMlpFunction.apply(*inputs, self.recompute)
        return out

    def _is_plain(self, x: Tensor) -> bool:
        return (
            runs_eagerly()
            and is_plain_tensor(x)
            and is_plain_linear(self.fc1)
            and is_plain_linear(self.fc2)
            and isinstance(self.act, nn.GELU)
            and self.act.approximate == "none"
            and isinstance(self.norm, nn.Identity)
            and not (self.training and (self.drop1.p or self.drop2.p))
            and x.ndim > 1
            and x.numel() > 0
            and not x.is_meta
            and (x.dtype == self.fc1.weight.dtype or autocast_dtype(x) is not None)
        )

    def __prepare_scriptable__(self) -> nn.Module:
        plain = Mlp(1)
        plain.__dict__.update(self.__dict__, _modules=dict(self._modules))
        # torch.jit identifies modules by id while it scripts, so no module that it has seen may be freed.
        plain._replaced = [self]
        return plain


# The MLPs that can be named in args.yaml and config.json; all but the first are timm's own.
MLP_LAYERS: dict[str, Callable[..., nn.Module]] = {"mlp": LeanMlp, "swiglu": SwiGLU, "swiglu_packed": SwiGLUPacked}

MlpLayer = str | Callable[..., nn.Module] | None


def mlp_class(layer: MlpLayer) -> Callable[..., nn.Module]:
    """The class for `mlp_layer`: a name, a class, or None for the default. Raises ValueError for an unknown name."""
    if not isinstance(layer, str):
        return layer or LeanMlp
    if layer not in MLP_LAYERS:
        raise ValueError(unknown_choice("mlp_layer", layer, MLP_LAYERS))
    return MLP_LAYERS[layer]


class _LeanMlpFunction(torch.autograd.Function):
    """fc2(GELU(fc1(x))), keeping x and, unless it is recomputed too, fc1(x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, recompute: Recompute
    ) -> Tensor:
        hidden = x.new_empty(*x.shape[:-1], w1.shape[0]) if recompute == "activation" else None
        ctx.save_for_backward(x, w1, b1, w2, hidden)
        return _forward(x, w1, b1, w2, b2, hidden=hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, hidden = ctx.saved_tensors
        if torch.is_grad_enabled() or not runs_eagerly() or is_legacy_batchedtensor(grad):
            # With create_graph, gradients must be differentiable. With torch.func.vmap or `is_grads_batched`, the
            # gradient is a batched tensor, which cannot be written into a buffer.
            return *_differentiable_backward(grad, ctx.needs_input_grad[:5], x, w1, b1, w2), None
        return *_backward(grad, ctx.needs_input_grad[:5], x, w1, b1, w2, hidden), None


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, hidden: Tensor | None
) -> Tensor:
    """The output (…, D); fills `hidden` (…, D'), if given, with fc1(x)."""
    rows = x.flatten(0, -2)  # (n, D)
    out = rows.new_empty(rows.shape[0], w2.shape[0])
    kept = None if hidden is None else hidden.flatten(0, -2)
    wanted = _chunk_tokens(rows, w1)
    buffer = rows.new_empty(chunk_length(rows.shape[0], wanted), w1.shape[0])
    for chunk in equal_chunks(rows.shape[0], wanted):
        activated = buffer[: chunk.stop - chunk.start]
        before = activated if kept is None else kept[chunk]
        _linear(rows[chunk], w1, b1, out=before)
        torch.ops.aten.gelu.out(before, out=activated)
        _linear(activated, w2, b2, out=out[chunk])
    return out.unflatten(0, x.shape[:-1])


def _backward(
    grad: Tensor, needed: tuple[bool, ...], x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, hidden: Tensor | None
) -> list[Tensor | None]:
    rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)  # (n, D)
    kept = None if hidden is None else hidden.flatten(0, -2)
    shapes = (rows.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    grads = [rows.new_empty(shape) if need else None for shape, need in zip(shapes, needed)]
    grad_x, grad_w1, grad_b1, grad_w2, grad_b2 = grads
    wanted = _chunk_tokens(rows, w1)
    length = chunk_length(rows.shape[0], wanted)
    buffers = [rows.new_empty(length, w1.shape[0]) for _ in range(2 if kept is not None else 3)]
    for chunk in equal_chunks(rows.shape[0], wanted):
        activated, upstream, *spare = (buffer[: chunk.stop - chunk.start] for buffer in buffers)
        before = spare[0] if kept is None else kept[chunk]
        if kept is None:
            _linear(rows[chunk], w1, b1, out=before)
        if grad_w2 is not None:
            torch.ops.aten.gelu.out(before, out=activated)
            _accumulate(grad_w2, grad_rows[chunk].mT, activated, first=chunk.start == 0)
        torch.mm(grad_rows[chunk], w2, out=upstream)
        # From here on, `activated` holds the gradient of the GELU's input.
        torch.ops.aten.gelu_backward.grad_input(upstream, before, grad_input=activated)
        if grad_w1 is not None:
            _accumulate(grad_w1, activated.mT, rows[chunk], first=chunk.start == 0)
        if grad_b1 is not None:
            part = activated.sum(0)
            grad_b1 = part if chunk.start == 0 else grad_b1 + part
        if grad_x is not None:
            torch.mm(activated, w1, out=grad_x[chunk])
    if grad_b2 is not None:
        torch.sum(grad_rows, 0, out=grad_b2)
    return [None if grad_x is None else grad_x.unflatten(0, x.shape[:-1]), grad_w1, grad_b1, grad_w2, grad_b2]


def _differentiable_backward(
    grad: Tensor, needed: tuple[bool, ...], x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor
) -> list[Tensor | None]:
    """The gradients as formulas that autograd can differentiate.

    `torch.autograd.grad` would be wrong here: if x depends on the weights (a block applied twice), it would include
    that path, which the backward pass of the layer below adds again.
    """
    # The forward pass has already cast everything to one precision.
    with torch.autocast(x.device.type, enabled=False):
        # Legacy vmap has no rules for `flatten`, `unflatten` and `mT`.
        rows, grad_rows = x.flatten(0, -2), grad.reshape(-1, grad.shape[-1])  # (n, D)
        before = rows @ w1.mT
        if b1 is not None:
            before = before + b1
        density = torch.exp(-0.5 * before.square()) / math.sqrt(2 * math.pi)
        share = 0.5 * (1 + torch.erf(before * math.sqrt(0.5)))
        grad_before = (grad_rows @ w2) * (share + before * density)
        return [
            (grad_before @ w1).reshape(x.shape) if needed[0] else None,
            grad_before.transpose(0, 1) @ rows if needed[1] else None,
            grad_before.sum(0) if needed[2] else None,
            grad_rows.transpose(0, 1) @ (before * share) if needed[3] else None,
            grad_rows.sum(0) if needed[4] else None,
        ]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.mT, out=out)
    else:
        torch.addmm(bias, x, weight.mT, out=out)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    if first:
        torch.mm(a, b, out=total)
    else:
        torch.addmm(total, a, b, out=total)


def _chunk_tokens(rows: Tensor, w1: Tensor) -> int:
    # A GPU needs all rows at once to be busy, and in half precision sums over chunks would lose accuracy.
    if not rows.is_cpu or rows.dtype not in (torch.float32, torch.float64):
        return rows.shape[0]
    return CHUNK_ELEMENTS // w1.shape[0]
