"""The transformer's MLP with less memory traffic: fc2(GELU(fc1(x))), the same function as timm's `Mlp`.

timm's layers keep the hidden activations twice for the backward pass (before and after the GELU), 8 of the 16 widths
that a ViT block keeps a token. On a CPU the GELU is computed again here from what it was given, which leaves 4; with
`recompute="hidden"` fc1 is computed again too, on a GPU as well, which leaves none.

On a CPU, too, the tokens go through in runs whose hidden activations fit the cache, in buffers that are used again:
fresh memory is paid for page by page, which for long sequences costs more than the GELU does.

B batch, T tokens, D width, D' hidden width, n = B·T rows.

Layers by name, so that what a model is made of can be written down: in args.yaml, in config.json.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import LayerNorm, Mlp, SwiGLU, SwiGLUPacked, get_norm_layer
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linvit.model.eager import autocast_dtype, equal_runs, is_plain_linear, is_plain_tensor, run_length, runs_eagerly
from linvit.settings.fields import none_of

# What the backward pass computes again: the GELU alone (on a CPU), or all that is hidden.
Recompute = Literal["activation", "hidden"]

# Hidden activations of one run over the tokens: 6 MiB in single precision, 1,024 tokens of a ViT-S.
RUN_ELEMENTS = 3 * 2**19


@register_notrace_module
class LeanMlp(Mlp):
    """timm's `Mlp`, same parameters and same results, that keeps less for the backward pass.

    Anything but two biased or unbiased linear layers around an exact GELU (another activation, a norm in between,
    active dropout, layers with hooks or replaced by an adapter, tensor subclasses such as quantised weights) runs as in
    timm, under `torch.utils.checkpoint` where `recompute` is "hidden". So does compiled and exported code, which is
    fused by its compiler, and forward-mode differentiation.
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
            and x.numel() > 0
            and not x.is_meta
            and (x.dtype == self.fc1.weight.dtype or autocast_dtype(x) is not None)
        )

    def __prepare_scriptable__(self) -> nn.Module:
        plain = Mlp(1)
        plain.__dict__.update(self.__dict__, _modules=dict(self._modules))
        # torch.jit remembers modules by id while it scripts: none that it has seen may be freed.
        plain._replaced = [self]
        return plain


class _LeanMlpFunction(torch.autograd.Function):
    """fc2(GELU(fc1(x))) that keeps x and, unless that is recomputed too, fc1(x)."""

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
        if torch.is_grad_enabled() or not runs_eagerly():
            # Asked for with create_graph: gradients that can be differentiated again. Or batched by torch.func.vmap,
            # which writing into buffers does not allow.
            return *_differentiable_backward(grad, ctx.needs_input_grad[:5], x, w1, b1, w2), None
        return *_backward(grad, ctx.needs_input_grad[:5], x, w1, b1, w2, hidden), None


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, hidden: Tensor | None
) -> Tensor:
    """The output (…, D); fills `hidden` (…, D') with fc1(x) where it is given."""
    rows = x.flatten(0, -2)  # (n, D)
    out = rows.new_empty(rows.shape[0], w2.shape[0])
    kept = None if hidden is None else hidden.flatten(0, -2)
    wanted = _run_tokens(rows, w1)
    buffer = rows.new_empty(run_length(rows.shape[0], wanted), w1.shape[0])
    for run in equal_runs(rows.shape[0], wanted):
        activated = buffer[: run.stop - run.start]
        before = activated if kept is None else kept[run]
        _linear(rows[run], w1, b1, out=before)
        torch.ops.aten.gelu.out(before, out=activated)
        _linear(activated, w2, b2, out=out[run])
    return out.unflatten(0, x.shape[:-1])


def _backward(
    grad: Tensor, needed: tuple[bool, ...], x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, hidden: Tensor | None
) -> list[Tensor | None]:
    rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)  # (n, D)
    kept = None if hidden is None else hidden.flatten(0, -2)
    shapes = (rows.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    grads = [rows.new_empty(shape) if need else None for shape, need in zip(shapes, needed)]
    grad_x, grad_w1, grad_b1, grad_w2, grad_b2 = grads
    wanted = _run_tokens(rows, w1)
    length = run_length(rows.shape[0], wanted)
    buffers = [rows.new_empty(length, w1.shape[0]) for _ in range(2 if kept is not None else 3)]
    for run in equal_runs(rows.shape[0], wanted):
        activated, upstream, *spare = (buffer[: run.stop - run.start] for buffer in buffers)
        before = spare[0] if kept is None else kept[run]
        if kept is None:
            _linear(rows[run], w1, b1, out=before)
        if grad_w2 is not None:
            torch.ops.aten.gelu.out(before, out=activated)
            _accumulate(grad_w2, grad_rows[run].mT, activated, first=run.start == 0)
        torch.mm(grad_rows[run], w2, out=upstream)
        # From here on `activated` holds the gradient before the GELU.
        torch.ops.aten.gelu_backward.grad_input(upstream, before, grad_input=activated)
        if grad_w1 is not None:
            _accumulate(grad_w1, activated.mT, rows[run], first=run.start == 0)
        if grad_b1 is not None:
            part = activated.sum(0)
            grad_b1 = part if run.start == 0 else grad_b1 + part
        if grad_x is not None:
            torch.mm(activated, w1, out=grad_x[run])
    if grad_b2 is not None:
        torch.sum(grad_rows, 0, out=grad_b2)
    return [None if grad_x is None else grad_x.unflatten(0, x.shape[:-1]), grad_w1, grad_b1, grad_w2, grad_b2]


def _differentiable_backward(
    grad: Tensor, needed: tuple[bool, ...], x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor
) -> list[Tensor | None]:
    """The gradients as formulas that autograd differentiates again.

    Not by `torch.autograd.grad`: where x follows from the weights (a block applied twice), it would count that path
    too, which the backward pass of the layer below adds.
    """
    # Forward, autocast has cast all to one precision already.
    with torch.autocast(x.device.type, enabled=False):
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)  # (n, D)
        before = rows @ w1.mT
        if b1 is not None:
            before = before + b1
        density = torch.exp(-0.5 * before.square()) / math.sqrt(2 * math.pi)
        share = 0.5 * (1 + torch.erf(before * math.sqrt(0.5)))
        grad_before = (grad_rows @ w2) * (share + before * density)
        return [
            (grad_before @ w1).unflatten(0, x.shape[:-1]) if needed[0] else None,
            grad_before.mT @ rows if needed[1] else None,
            grad_before.sum(0) if needed[2] else None,
            grad_rows.mT @ (before * share) if needed[3] else None,
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


def _run_tokens(rows: Tensor, w1: Tensor) -> int:
    # A GPU needs all rows at once to be busy, and half precision would lose in sums over runs.
    if not rows.is_cpu or rows.dtype not in (torch.float32, torch.float64):
        return rows.shape[0]
    return RUN_ELEMENTS // w1.shape[0]


# `mlp` is timm's Mlp, keeping less for the backward pass; the others are timm's own.
MLP_LAYERS: dict[str, Callable[..., nn.Module]] = {"mlp": LeanMlp, "swiglu": SwiGLU, "swiglu_packed": SwiGLUPacked}

LayerLike = str | Callable[..., nn.Module] | None


def mlp_class(layer: LayerLike) -> Callable[..., nn.Module]:
    """The MLP of that name; a class is itself, None the default. Raises ValueError for an unknown name."""
    if not isinstance(layer, str):
        return layer or LeanMlp
    if layer not in MLP_LAYERS:
        raise ValueError(none_of("mlp_layer", layer, MLP_LAYERS))
    return MLP_LAYERS[layer]


def norm_with_eps(layer: LayerLike, eps: float) -> Any:
    """timm's normalisation of that name (None: layer norm), or a class, with its `eps`."""
    return partial(get_norm_layer(layer) or LayerNorm, eps=eps)
