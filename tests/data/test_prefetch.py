"""Batches arrive complete and in order, one ahead on a GPU; an error does not lose the batch before it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from linvit.data import loader
from linvit.data.loader import Batch, prefetch


def make_batch(number: int, device: torch.device | str = "cpu") -> Batch:
    images = torch.full((2, 3, 4, 4), float(number)).to(device, non_blocking=True)
    return Batch(images, torch.full((2,), number).to(device), torch.arange(2))


class Source:
    """Numbers; records those that were sent."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.sent: list[int] = []

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def send(self, number: int) -> Batch:
        if number == 7:
            raise ValueError("the eighth is broken")
        self.sent.append(number)
        return make_batch(number)


def numbers(batches: Iterator[Batch]) -> list[int]:
    return [int(batch.images.mean()) for batch in batches]


class FakeStream:
    def record_event(self) -> None:
        return None


@pytest.fixture(params=["plain", "on a stream"])
def fetch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Source], Iterator[Batch]]:
    """Prefetching on a CPU, and as on a GPU but with a fake stream."""
    if request.param == "plain":
        return lambda source: prefetch(source, source.send, torch.device("cpu"))
    monkeypatch.setattr(loader, "_synchronize", lambda batch, sent: batch)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    stream: Any = FakeStream()
    return lambda source: loader._prefetch_on_stream(source, source.send, stream)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_batch_arrives_once_and_in_order(count: int, fetch: Callable[[Source], Iterator[Batch]]) -> None:
    assert numbers(fetch(Source(count))) == list(range(count))


def test_an_error_is_raised_after_the_batches_before_it(fetch: Callable[[Source], Iterator[Batch]]) -> None:
    batches = fetch(Source(20))
    assert [int(next(batches).images.mean()) for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match="the eighth"):
        next(batches)


def test_a_gpu_receives_one_batch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_synchronize", lambda batch, sent: batch)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    source = Source(5)
    stream: Any = FakeStream()
    batches = loader._prefetch_on_stream(source, source.send, stream)
    assert source.sent == []
    next(batches)
    assert source.sent == [0, 1]
    next(batches)
    assert source.sent == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_complete_when_they_are_used() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    busy = torch.randn(2048, 2048, device=device)
    pinned = [torch.full((16, 3, 256, 256), float(number)).pin_memory() for number in range(12)]

    def send(number: int) -> Batch:
        # Arithmetic after the copy, as in the normalisation.
        images = pinned[number].to(device, non_blocking=True).mul_(2).add_(1)
        return Batch(images, torch.full((2,), number, device=device), torch.arange(2))

    sums = []
    for batch in prefetch(range(12), send, device):
        # The current stream lags behind, and the memory of earlier batches is reused.
        busy = torch.mm(busy, busy).clamp_(-1, 1)
        sums.append((batch.images.min(), batch.images.max(), batch.labels.sum()))
    for number, (least, most, label) in enumerate(sums):
        assert least.item() == most.item() == 2 * number + 1
        assert label.item() == 2 * number
