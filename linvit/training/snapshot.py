"""Copies of a training state in the CPU's memory, taken between two steps so that training can go on meanwhile."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def take_snapshot(state: dict[str, Any], device: torch.device) -> Callable[[], dict[str, Any]]:
    """Copy the tensors in a nest of dicts and lists; the call returned waits for the copies and gives the same nest.

    Copies from a GPU are queued on a stream of their own, into pinned memory. The host goes on at once; what it queues
    from then on waits, on the device, until they are made.
    """
    if device.type != "cuda":
        copies = _copied(state)
        return lambda: copies
    with torch.cuda.device(device):
        training, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(training)
        with torch.cuda.stream(side):
            copies = _copied(state)
            made = side.record_event()
        training.wait_stream(side)

    def wait() -> dict[str, Any]:
        made.synchronize()
        return copies

    return wait


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.device.type != "cuda":
            return value.detach().to("cpu", copy=True)
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(part) for part in value)
    return value
