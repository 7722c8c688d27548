"""Chunks of tokens, and when hand-written code may run."""

import pytest
import torch
from kinds import REDUCING
from small_layers import ORDERS, expected, make_attention, tokens
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from linvit.model import kernels
from linvit.model.kernels import (
    apply_in_chunks,
    autocast_dtype,
    choose_order,
    chunk_length,
    equal_chunks,
    is_plain_linear,
    query_chunks,
    runs_eagerly,
    split_attention,
)


class Kernels(TorchDispatchMode):
    """Records the names of operations that compute or copy something, each of them a kernel on a GPU."""

    VIEWS = {
        "view",
        "_unsafe_view",
        "expand",
        "transpose",
        "t",
        "permute",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
    } | {
        "split",
        "split_with_sizes",
        "unbind",
        "detach",
        "alias",
    }

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names += [] if name in self.VIEWS else [name]
        return function(*args, **(kwargs or {}))


def test_a_layer_without_prefix_tokens_takes_few_kernels():
    attention, _, _ = make_attention("separable", "kv", (8, 8), prefix=0, k=4)
    attention.order, x = "associative", tokens((8, 8), prefix=0)
    with Kernels() as forward:
        out = attention(x)
    with Kernels() as backward:
        out.sum().backward()
    # E's two products, three for its row sums, keys and values with their bias, queries, attention, output.
    assert len(forward.names) == 10, forward.names
    # The gradient of an image's slice, or of a prefix without tokens, would be a copy of all tokens.
    assert "slice_backward" not in backward.names
    assert len(backward.names) <= 34, backward.names


@pytest.mark.parametrize("total", [1, 2, 1024, 1025, 1537, 16385])
@pytest.mark.parametrize("wanted", [0, 1, 5, 1024])
def test_chunks_cover_all_and_are_equal(total, wanted):
    chunks = list(equal_chunks(total, wanted))
    lengths = [chunk.stop - chunk.start for chunk in chunks]
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(total))
    assert max(lengths) == chunk_length(total, wanted)
    assert max(lengths) <= max(1, 1.5 * wanted)
    if wanted == 1024:
        assert min(lengths) > 0.6 * max(lengths)


@pytest.mark.parametrize("shape", [(1, 23), (5, 4), (3, 1), (2, 12)], ids=str)
@pytest.mark.parametrize("wanted", [1, 5, 8, 100])
def test_apply_in_chunks(shape, wanted):
    x = torch.randn(*shape, 3)
    of_image = torch.randn(shape[0], 1, 3)
    longest = 0

    def scale(tokens, images):
        nonlocal longest
        longest = max(longest, tokens.shape[0] * tokens.shape[1])
        return tokens * of_image[images]

    torch.testing.assert_close(apply_in_chunks(scale, x, wanted), x * of_image, rtol=0, atol=0)
    assert longest <= 1.5 * wanted


def test_plain_linear():
    plain = nn.Linear(2, 2)
    assert is_plain_linear(plain)
    assert not is_plain_linear(parametrizations.weight_norm(nn.Linear(2, 2)))
    for register in (
        plain.register_forward_hook,
        plain.register_forward_pre_hook,
        plain.register_full_backward_hook,
        plain.register_full_backward_pre_hook,
    ):
        hook = register(lambda *_: None)
        assert not is_plain_linear(plain)
        hook.remove()
        assert is_plain_linear(plain)


def test_runs_eagerly():
    assert runs_eagerly()
    seen = []
    torch.func.grad(lambda x: (seen.append(runs_eagerly()), x.sum())[1])(torch.ones(2))
    torch.jit.trace(lambda x: (seen.append(runs_eagerly()), x * 2)[1], torch.ones(2), check_trace=False)
    assert seen[0] is False
    assert not any(seen)


def test_autocast_dtype():
    x = torch.zeros(1)
    assert autocast_dtype(x) is None
    assert autocast_dtype(x.to("meta")) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(x) == torch.bfloat16
        assert autocast_dtype(x.double()) is None
        run = torch.compile(lambda x: x.to(autocast_dtype(x)), backend="eager", fullgraph=True)
        assert run(x).dtype == torch.bfloat16


def test_cost_rule():
    small = dict(dim=384, num_heads=6, num_patches=4096, foldable=True)
    assert choose_order(num_keys=33, k=32, num_maps=1, **small) == "folded"
    # K·H and the folding itself cost 402 against D + K = 449, then 464 against 459.
    assert choose_order(num_keys=65, k=64, num_maps=1, **small) == "folded"
    assert choose_order(num_keys=75, k=74, num_maps=1, **small) == "associative"
    assert choose_order(num_keys=257, k=256, num_maps=1, **small) == "associative"
    # With few patches folding does not pay: 300 + 195 against 434.
    assert choose_order(num_keys=50, k=49, num_maps=1, **{**small, "num_patches": 196}) == "associative"
    assert choose_order(num_keys=257, k=256, num_maps=6, **small) == "per_head"
    assert choose_order(num_keys=101, k=100, num_maps=3, **small) == "associative"
    assert choose_order(num_keys=33, k=32, num_maps=1, **{**small, "foldable": False}) == "associative"


@pytest.mark.parametrize("kind", REDUCING)
def test_kinds_that_reduce_tokens_have_no_per_head_order(kind):
    attention, _, _ = make_attention(kind, "kv", (7, 5), 1)
    attention.order = "per_head"
    with pytest.raises(ValueError, match=f"projection '{kind}' reduces tokens before Wk and Wv"):
        attention(tokens((7, 5), 1))
    rule = dict(dim=384, num_heads=6, k=256, num_patches=4096, num_maps=6, is_matrix=False)
    assert choose_order(**rule, num_keys=257, foldable=True) == "associative"


class Adapted(nn.Linear):
    """A linear layer whose output does not follow from its weight alone."""

    def forward(self, x):
        return super().forward(x) * 1.5


@pytest.mark.parametrize("layer", ["qkv", "proj"])
@pytest.mark.parametrize("order", ORDERS)
def test_adapters_are_called(order, layer):
    attention, E, F = make_attention("separable", "kv", (7, 5), 1)
    x = tokens((7, 5), 1)
    plain = getattr(attention, layer)
    adapted = Adapted(plain.in_features, plain.out_features, dtype=torch.float64)
    adapted.load_state_dict(plain.state_dict())
    setattr(attention, layer, adapted)
    attention.order = order
    out = attention(x)
    for parameter in (plain.weight, plain.bias):
        parameter.data *= 1.5
    setattr(attention, layer, plain)
    torch.testing.assert_close(out, expected(attention, E, F, x), rtol=0, atol=1e-10)


def test_kinds_that_reduce_tokens_refuse_an_adapted_qkv():
    attention, _, _ = make_attention("conv", "kv", (7, 5), 1)
    attention.qkv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="remove adapters, hooks and quantised weights from qkv"):
        attention(tokens((7, 5), 1))


def parts(batch=2, heads=3, queries=37, keys=5, width=4):
    # As in attention, the heads of a token lie next to each other in memory.
    q = torch.randn(batch, queries, heads, width, dtype=torch.float64).transpose(1, 2)
    k, v = torch.randn(2, batch, heads, keys, width, dtype=torch.float64).unbind(0)
    return [each.requires_grad_() for each in (q, k, v)]


@pytest.mark.parametrize("chunks", [2, 3, 36, 37, 50])
@pytest.mark.parametrize("bias", [None, (1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
def test_chunks_equal_one_call(chunks, bias):
    inputs = parts()
    bias = None if bias is None else torch.randn(*bias, 1, 5, dtype=torch.float64)
    split = split_attention(*inputs, bias=bias, dropout=0.0, chunks=chunks)
    whole = F.scaled_dot_product_attention(*inputs, attn_mask=bias)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(whole)
    for a, b in zip(*(torch.autograd.grad(out, inputs, cotangent) for out in (split, whole))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_chunks_of_queries_are_not_copies():
    q, k, v = parts(queries=36)
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention:
                seen.append(args[0])
            return function(*args, **(kwargs or {}))

    with Watch():
        split_attention(q, k, v, bias=None, dropout=0.0, chunks=3)
    assert seen[0].shape == (6, 3, 12, 4)
    assert seen[0].data_ptr() == q.data_ptr()


def test_number_of_chunks_by_size():
    small = dict(heads=6, queries=4097)
    assert query_chunks(batch=1, keys=65, **small) == 8
    assert query_chunks(batch=1, keys=65, heads=6, queries=65537) == 43
    assert query_chunks(batch=16, keys=65, **small) == 3
    assert query_chunks(batch=64, keys=65, **small) == 1
    assert query_chunks(batch=1, keys=4097, **small) == 2
    assert query_chunks(batch=1, keys=65, heads=6, queries=197) == 1
    assert query_chunks(batch=8, keys=65, **small, cudnn=True) == 1
    assert query_chunks(batch=2, keys=257, heads=6, queries=16385, cudnn=True) == 8


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_choice_of_kernels_does_not_break_the_graph(capability, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    run = torch.compile(lambda x: x + 1 if kernels._prefers_cudnn() else x - 1, backend="eager", fullgraph=True)
    assert run(torch.zeros(1)).item() == (1 if capability == (9, 0) else -1)


def test_no_chunks_on_a_cpu_by_default():
    inputs = parts(queries=4097)
    whole = F.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(split_attention(*inputs, bias=None, dropout=0.0), whole, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    inputs = [
        each.detach().to("cuda", dtype).requires_grad_() for each in parts(batch=1, queries=4097, keys=65, width=64)
    ]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    bias = torch.randn(1, 1, 1, 65, device="cuda", dtype=dtype)
    outs = [
        split_attention(*inputs, bias=bias, dropout=0.0),
        F.scaled_dot_product_attention(*exact, attn_mask=bias.double()),
    ]
    torch.testing.assert_close(outs[0].double(), outs[1], rtol=2e-2, atol=2e-2)
    cotangent = torch.randn_like(outs[1])
    grads = [torch.autograd.grad(out, each, cotangent.to(out)) for out, each in zip(outs, (inputs, exact))]
    for a, b in zip(*grads):
        torch.testing.assert_close(a.double(), b, rtol=5e-2, atol=5e-2 * b.abs().max().item())
