"""Copies of a training state in the CPU's memory, taken between two steps so that training can go on meanwhile.

Writing in the background: training goes on meanwhile, also where the disk is full.
"""

import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

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


Task = Callable[[], object]


class Saver:
    """Runs what writes files in one thread, a save at a time.

    A save is a list of named tasks in order. A task that fails with an OSError is reported on stderr; it and those
    after it stay and are tried again, in order, with the next save, unless that brings a newer task of the same name.
    So what a save writes last is never there without what it writes first.

    Use it as a context: leaving it waits for the save under way, except by KeyboardInterrupt, which nothing holds up.
    """

    def __init__(self) -> None:
        self._left: dict[str, Task] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            self._join()

    def save(self, tasks: Mapping[str, Task]) -> None:
        """Begin to run what is left of the saves before and then these; waits first for a save under way."""
        self.wait()
        for name, task in tasks.items():
            # Last, even where an older one of that name comes earlier.
            self._left.pop(name, None)
            self._left[name] = task
        # A daemon, so that the second Ctrl-C need not wait for it.
        self._thread = threading.Thread(target=self._run, name="saver", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save under way. Raises what went wrong in it, but for an OSError, which was reported."""
        self._join()
        error, self._error = self._error, None
        if error is not None and not isinstance(error, OSError):
            raise error

    def finish(self) -> None:
        """Wait, and try once more what could not be written; raises OSError where it still cannot be."""
        self.wait()
        self._run(report=False)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, report: bool = True) -> None:
        try:
            while self._left:
                name = next(iter(self._left))
                self._left[name]()
                del self._left[name]
        except OSError as error:
            self._error = error
            if report:
                print(f"warning: {error}; training goes on, and the next save tries again", file=sys.stderr, flush=True)
        except BaseException as error:
            self._error = error


class SaveClock:
    """Tells when a save within an epoch is due: so many updates or minutes after the last one; None: never."""

    def __init__(self, *, updates: int | None, minutes: float | None) -> None:
        self._updates, self._seconds = updates, None if minutes is None else minutes * 60
        self.restart()

    @property
    def is_set(self) -> bool:
        """Whether a save within an epoch is ever due."""
        return self._updates is not None or self._seconds is not None

    def restart(self) -> None:
        """Take note of a save."""
        self._num_updates, self._started = 0, time.monotonic()

    def is_due(self) -> bool:
        """Whether one is due after this update, which is counted."""
        self._num_updates += 1
        if self._updates is not None and self._num_updates >= self._updates:
            return True
        return self._seconds is not None and time.monotonic() - self._started >= self._seconds
