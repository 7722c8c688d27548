"""Chunks of tokens, and when hand-written code may run."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from linvit.model.eager import (
    apply_in_chunks,
    autocast_dtype,
    chunk_length,
    equal_chunks,
    is_plain_linear,
    runs_eagerly,
)


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
