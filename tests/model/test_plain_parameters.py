"""Tensor subclasses, forward mode, higher derivatives and batched gradients work as in timm."""

import copy

import pytest
import torch
from kinds import GRIDS, KIND_SHARES, REDUCING, orders_of
from small_layers import EXACT, RECOMPUTE, make_attention, mlp_pair, tokens
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

import linvit
from linvit.model.kernels import in_forward_mode, is_plain_linear, runs_eagerly, runs_in_chunks

SHARED_KINDS = [(kind, share) for kind, share in KIND_SHARES if kind not in (*REDUCING, "identity")]
LINEAR = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.linear)
KEPT = (torch.ops.aten.detach, torch.ops.aten.t, torch.ops.aten.transpose, torch.ops.aten.alias)


class Int8Weight(torch.Tensor):
    """An eight-bit weight with one scale, which supports only products and transposition."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=scale.dtype, requires_grad=False
        )

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def dequantised(self):
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        if packet in KEPT:
            return cls(packet(args[0].codes, *args[1:]), args[0].scale)
        if packet in LINEAR and "out" not in (kwargs or {}):
            plain = tree_map(lambda each: each.dequantised() if isinstance(each, cls) else each, args)
            return func(*plain, **(kwargs or {}))
        raise NotImplementedError(f"an eight-bit weight does not support {func}")


def quantise(model):
    """`model` with eight-bit weights in every linear layer, and a plain copy with the same values."""
    plain = copy.deepcopy(model)
    for ours, theirs in zip(model.modules(), plain.modules()):
        if type(ours) is nn.Linear:
            weight = ours.weight.detach()
            scale = weight.abs().max() / 127
            quantised = Int8Weight((weight / scale).round().to(torch.int8), scale)
            theirs.weight.data = quantised.dequantised()
            ours.weight = nn.Parameter(quantised, requires_grad=False)
    return model, plain


def assert_same_function(ours, theirs, x):
    outs = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-10)
    cotangent = torch.randn_like(outs[0])
    torch.testing.assert_close(*(torch.autograd.grad(y, x, cotangent)[0] for y in outs), rtol=0, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-10)


def vit(**kwargs):
    kwargs = {"img_size": 32, "patch_size": 8, "k": 4, "embed_dim": 12, "depth": 2, "num_heads": 3} | kwargs
    return linvit.LinformerViT(num_classes=5, **kwargs).double().eval()


def images():
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)


def test_subclasses_are_not_plain():
    layer = nn.Linear(4, 4)
    assert is_plain_linear(layer)
    assert not is_plain_linear(quantise(nn.Sequential(nn.Linear(4, 4)))[0][0])
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert not is_plain_linear(layer)
    layer = nn.Linear(4, 4)
    layer.bias = nn.Parameter(layer.bias.detach().as_subclass(type("Other", (torch.Tensor,), {})))
    assert not is_plain_linear(layer)
    with torch.no_grad():
        assert runs_in_chunks(torch.ones(2))
        assert not runs_in_chunks(torch.ones(2).as_subclass(type("Other", (torch.Tensor,), {})))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("bias", [True, False])
def test_quantised_mlp(recompute, bias):
    assert_same_function(*quantise(mlp_pair(recompute, bias=bias)[0]), tokens((7, 5), 1))


@pytest.mark.parametrize(("kind", "share"), SHARED_KINDS)
@pytest.mark.parametrize("order", [None, "per_head", "associative", "folded"])
def test_quantised_attention(kind, share, order):
    attention, *_ = make_attention(kind, share, GRIDS[0], 1)
    attention.order = order
    assert_same_function(*quantise(attention), tokens(GRIDS[0], 1))


@pytest.mark.parametrize("kind", REDUCING)
def test_kinds_that_reduce_tokens_refuse_a_quantised_qkv(kind):
    attention, _ = quantise(make_attention(kind, "kv", GRIDS[0], 1)[0])
    with pytest.raises(ValueError, match="has no per_head order"):
        attention(tokens(GRIDS[0], 1))


@pytest.mark.parametrize("share", ["none", "headwise", "kv", "layerwise"])
@pytest.mark.parametrize("checkpointing", [False, "mlp", "full"])
def test_quantised_model(share, checkpointing):
    ours, theirs = quantise(vit(share=share))
    for model in (ours, theirs):
        model.set_grad_checkpointing(checkpointing)
    assert_same_function(ours, theirs, images())


def assert_forward_mode(function, x):
    """Dual numbers and `torch.func.jvp` against reverse mode and finite differences."""
    value = function(x)
    cotangent = torch.randn_like(value)
    (gradient,) = torch.autograd.grad(value, x, cotangent)
    x = x.detach()
    tangent = torch.randn_like(x)
    nearby = (function(x + 1e-5 * tangent) - function(x - 1e-5 * tangent)) / 2e-5

    def dual():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))

    found = [torch.func.jvp(function, (x,), (tangent,)), dual()]
    with torch.no_grad():
        found.append(dual())
    for primal, derivative in found:
        torch.testing.assert_close(primal, value, rtol=0, atol=1e-10)
        torch.testing.assert_close(derivative, nearby, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close((derivative * cotangent).sum(), (gradient * tangent).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "share", "order"), [(k, s, order) for k, s in KIND_SHARES for order in orders_of(k)])
def test_forward_mode_of_attention(kind, share, order):
    if kind == "identity":
        share = "kv"
    attention, *_ = make_attention(kind, share, GRIDS[0], 1)
    attention.order = order
    if kind == "identity":
        # This is timm's own layer, and fused attention on a CPU has no forward mode.
        attention.fused_attn = False
    assert_forward_mode(attention, tokens(GRIDS[0], 1))


@pytest.mark.parametrize("projection", ["linear", "conv"])
def test_forward_mode_of_a_model(projection):
    assert_forward_mode(vit(projection=projection), images())


def test_forward_mode_of_the_mlp():
    assert_forward_mode(mlp_pair()[0], tokens((7, 5), 1))
    assert runs_eagerly()
    with forward_ad.dual_level():
        assert in_forward_mode()
        assert not runs_eagerly()


def twice(mlp, depth):
    def run(x, parameters):
        for _ in range(depth):
            x = x + torch.func.functional_call(mlp, parameters, (x,))
        return x

    return run


def first_and_second(run, x, parameters):
    """The gradients with a graph, and their own gradients."""
    inputs = [x, *parameters.values()]
    first = torch.autograd.grad(run(x, parameters).pow(3).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(each.sin().sum() for each in first), inputs)
    return [*first, *second]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False, (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_block_applied_again_with_create_graph(recompute, bias, depth):
    ours, theirs = mlp_pair(recompute, bias=bias)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    found, expected = (first_and_second(twice(m, depth), x, dict(m.named_parameters())) for m in (ours, theirs))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("depth", [1, 2])
def test_weights_after_a_differentiable_step(recompute, depth):
    """MAML: the gradient through a step of gradient descent, twice."""
    x, y = (torch.randn(2, 3, 12, dtype=torch.float64) for _ in range(2))

    def meta(mlp):
        run, slow = twice(mlp, depth), dict(mlp.named_parameters())
        fast = slow
        for _ in range(2):
            grads = torch.autograd.grad((run(x, fast) - y).square().mean(), list(fast.values()), create_graph=True)
            fast = {name: weight - 0.3 * grad for (name, weight), grad in zip(fast.items(), grads)}
        # The input depends on the weights too.
        moved = x * fast["fc1.weight"].mean()
        return torch.autograd.grad((run(moved, fast) - y).square().mean(), list(slow.values()))

    for a, b in zip(*(meta(mlp) for mlp in mlp_pair(recompute))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("inside", [True, False])
def test_create_graph_under_autocast(recompute, inside):
    ours, theirs = mlp_pair(recompute, dtype=torch.float32)
    x = torch.randn(2, 3, 12, requires_grad=True)
    # A gradient penalty, in single precision.
    exact = twice(theirs, 2)(x, dict(theirs.named_parameters())).square().mean()
    exact = torch.autograd.grad(exact, [x, *theirs.parameters()], create_graph=True)
    penalty = exact[0].square().sum()
    exact = [*exact, *torch.autograd.grad(penalty, [x, *theirs.parameters()])]
    parameters = dict(ours.named_parameters())
    inputs = [x, *parameters.values()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = twice(ours, 2)(x, parameters).square().mean()
        if inside:
            first = torch.autograd.grad(loss, inputs, create_graph=True)
    if not inside:
        first = torch.autograd.grad(loss, inputs, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), inputs)
    for a, b in zip([*first, *second], exact):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.05 * b.norm()


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_batched_cotangents(recompute):
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    cotangents = torch.randn(4, 3, 12, dtype=torch.float64)

    def gradients(mlp):
        y = mlp(x)
        return torch.func.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(cotangents)

    torch.testing.assert_close(*(gradients(mlp) for mlp in mlp_pair(recompute)), **EXACT)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_batched_gradients(recompute, bias, create_graph):
    """`is_grads_batched` uses the old vmap, which torch.func does not report."""
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    cotangents = torch.randn(4, 2, 3, 12, dtype=torch.float64)

    def gradients(mlp):
        inputs = [x, *mlp.parameters()]
        return torch.autograd.grad(mlp(x), inputs, cotangents, is_grads_batched=True, create_graph=create_graph)

    for a, b in zip(*(gradients(mlp) for mlp in mlp_pair(recompute, bias=bias))):
        torch.testing.assert_close(a, b, **EXACT)


def test_vectorised_jacobian_of_a_model():
    model = vit()
    x = images()
    jacobian = torch.autograd.functional.jacobian(model, x, vectorize=True)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(model, x), rtol=0, atol=1e-10)


def test_compiles_whole_and_exports_as_before():
    model = vit()
    x = images().detach()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-10)
    maxpool = vit(projection="maxpool")
    for strict in (True, False):
        exported = torch.export.export(maxpool, (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), maxpool(x), rtol=0, atol=1e-10)
