"""Batches on their way to a GPU while it works on the ones before them."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from linvit.data.batch import Batch

Raw = TypeVar("Raw")


def prefetched(source: Iterable[Raw], send: Callable[[Raw], Batch], device: torch.device) -> Iterator[Batch]:
    """What `send` makes of each item; to a GPU, along a stream of its own and one item ahead of what is asked for.

    An error in sending is raised after the batches before it were handed out.
    """
    if device.type == "cuda":
        yield from _ahead(source, send, torch.cuda.Stream(device))
    else:
        yield from map(send, source)


def _ahead(source: Iterable[Raw], send: Callable[[Raw], Batch], stream: torch.cuda.Stream) -> Iterator[Batch]:
    ready: tuple[Batch, torch.cuda.Event] | None = None
    for raw in source:
        try:
            with torch.cuda.stream(stream):
                following = send(raw), stream.record_event()
        except ValueError:
            if ready is not None:
                yield _arrived(*ready)
            raise
        if ready is not None:
            yield _arrived(*ready)
        ready = following
    if ready is not None:
        yield _arrived(*ready)


def _arrived(batch: Batch, sent: torch.cuda.Event) -> Batch:
    """The batch for the current stream, whose work on it begins when all of it is there."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(sent)
    for tensor in (batch.images, batch.labels):
        # Otherwise the memory could be given to a later batch while this stream still reads it.
        tensor.record_stream(current)
    return batch
