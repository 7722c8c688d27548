"""Queries in chunks give the attention, and the gradients, of all at once."""

import pytest
import torch
from torch.nn import functional as F

from linvit.model import sdpa
from linvit.model.sdpa import query_chunks, split_attention


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
    run = torch.compile(lambda x: x + 1 if sdpa._prefers_cudnn() else x - 1, backend="eager", fullgraph=True)
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
