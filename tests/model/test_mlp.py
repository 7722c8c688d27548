"""LeanMlp has the outputs and gradients of timm's Mlp, and keeps less for the backward pass."""

import pytest
import torch
from small_layers import EXACT, RECOMPUTE, mlp_pair
from torch import nn

from linvit.model import mlp as lean


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*shape, 12, dtype=dtype, requires_grad=True)


def assert_same(ours, theirs, x, **tolerance):
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b, **tolerance)
    cotangent = torch.randn_like(b)
    inputs = [(x, x), *zip(ours.parameters(), theirs.parameters())]
    learning = [(p, q) for p, q in inputs if p.requires_grad]
    grads = (torch.autograd.grad(y, list(each), cotangent) for y, each in zip((a, b), zip(*learning)))
    for p, q in zip(*grads):
        torch.testing.assert_close(p, q, **tolerance)


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of about five tokens."""
    monkeypatch.setattr(lean, "CHUNK_ELEMENTS", 5 * 48)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("bias", [True, False, (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("shape", [(2, 7), (1, 23), (17,), (1, 1), (3, 2, 4), (0, 7), ()], ids=str)
@pytest.mark.usefixtures("short_chunks")
def test_same_as_timms(recompute, bias, shape):
    assert_same(*mlp_pair(recompute, bias=bias), tokens(*shape), **EXACT)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(
    "kwargs",
    [{"act_layer": nn.SiLU}, {"norm_layer": nn.LayerNorm}, {"act_layer": lambda: nn.GELU("tanh")}],
    ids=["SiLU", "LayerNorm", "GELU-tanh"],
)
def test_other_layers_run_as_in_timm(recompute, kwargs):
    assert_same(*mlp_pair(recompute, **kwargs), tokens(2, 7), **EXACT)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("frozen", ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "x", "fc1 and fc2"])
@pytest.mark.usefixtures("short_chunks")
def test_frozen_parts(recompute, frozen):
    ours, theirs = mlp_pair(recompute)
    x = tokens(2, 7)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad = not (name == frozen or (frozen == "fc1 and fc2"))
    assert_same(ours, theirs, x.detach() if frozen == "x" else x, **EXACT)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_dropout_draws_as_timms(recompute):
    ours, theirs = mlp_pair(recompute, drop=0.4)
    x = tokens(2, 7)
    outs = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        out = module(x)
        outs.append((out, torch.autograd.grad(out.square().sum(), x)[0]))
    for a, b in zip(*outs):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.usefixtures("short_chunks")
def test_inference_is_the_same():
    ours, theirs = mlp_pair()
    x = tokens(2, 7)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), **EXACT)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_rounds_as_timms(recompute, autocast):
    ours, theirs = mlp_pair(recompute, dtype=torch.float32 if autocast else torch.bfloat16)
    x = tokens(2, 7, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert ours(x).dtype == torch.bfloat16
        assert_same(ours, theirs, x, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_second_derivatives(recompute):
    # Small: the check needs a pass for every element.
    ours = lean.LeanMlp(4, 6, dtype=torch.float64)
    ours.recompute = recompute
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w1, w2: _with(ours, x, w1, w2), (x, *_weights(ours)))


def _weights(mlp):
    return [each.detach().clone().requires_grad_() for each in (mlp.fc1.weight, mlp.fc2.weight)]


def _with(mlp, x, w1, w2):
    return lean._LeanMlpFunction.apply(x, w1, mlp.fc1.bias, w2, mlp.fc2.bias, mlp.recompute)


def test_torch_func():
    ours, theirs = mlp_pair()
    x = tokens(2, 7).detach()
    for transform in (torch.func.grad, torch.func.hessian):
        a, b = (transform(lambda x, m=m: m(x).square().sum())(x[:1, :2]) for m in (ours, theirs))
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_compiles_whole(recompute):
    ours, theirs = mlp_pair(recompute)
    assert_same(torch.compile(ours, backend="aot_eager", fullgraph=True), theirs, tokens(2, 7), **EXACT)


def test_scripts():
    ours, theirs = mlp_pair()
    x = tokens(2, 7)
    torch.testing.assert_close(torch.jit.script(ours)(x), theirs(x), **EXACT)
    assert isinstance(ours.fc1, nn.Linear)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_an_adapted_layer_is_called(recompute):
    """A linear layer that is wrapped, replaced or hooked is called, not bypassed."""

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1.0

    ours, _ = mlp_pair(recompute)
    x = tokens(2, 7)
    plain = ours(x)
    seen = []
    hook = ours.fc1.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(ours(x), plain, **EXACT)
    assert seen
    hook.remove()
    adapted = Adapted(12, 48, dtype=torch.float64)
    adapted.load_state_dict(ours.fc1.state_dict())
    ours.fc1 = adapted
    assert not torch.allclose(ours(x), plain)


def kept(module, x):
    """The number of elements kept for the backward pass, without parameters."""
    parameters = {parameter.data_ptr() for parameter in module.parameters()}
    sizes = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(sizes.values())


def test_elements_kept_for_the_backward_pass():
    ours, theirs = mlp_pair()
    x = tokens(1, 100)
    hidden = 100 * 48
    assert kept(theirs, x) == x.numel() + 2 * hidden
    assert kept(ours, x) == x.numel() + hidden
    ours.recompute = "hidden"
    assert kept(ours, x) == x.numel()
