"""Saving in the background: copy the training state to CPU memory, then write it while training continues."""

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from linvit.output.terminal import note

Task = Callable[[], object]


def take_snapshot(state: dict[str, Any], device: torch.device) -> Callable[[], dict[str, Any]]:
    """Copy the tensors in nested dicts and lists; the returned function waits for the copies and returns them.

    Copies from a GPU go into pinned memory on a separate stream. The host continues at once; the device runs later work
    only after the copies.
    """
    if device.type != "cuda":
        copies = _copy(state)
        return lambda: copies
    with torch.cuda.device(device):
        training, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(training)
        with torch.cuda.stream(side):
            copies = _copy(state)
            done = side.record_event()
        training.wait_stream(side)

    def wait() -> dict[str, Any]:
        done.synchronize()
        return copies

    return wait


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.device.type != "cuda":
            return value.detach().to("cpu", copy=True)
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: _copy(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(part) for part in value)
    return value


class Saver:
    """Runs saves in a background thread, one at a time.

    A save is an ordered list of named tasks. If a task fails with an OSError, the error is reported on stderr. The next
    save retries this task and those after it, in order, unless it has a newer task of the same name. So the last file
    of a save never exists without the first.

    Use it as a context manager: on exit it waits for the current save, except after KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._pending: dict[str, Task] = {}
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
        """Wait for the current save, then start the pending tasks of earlier saves and these."""
        self.wait()
        for name, task in tasks.items():
            # The newer task goes to the end, whatever the place of the older one.
            self._pending.pop(name, None)
            self._pending[name] = task
        # A daemon, so that a second Ctrl-C does not wait for it.
        self._thread = threading.Thread(target=self._run, name="saver", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the current save. Raises its error, unless that is an OSError, which was reported already."""
        self._join()
        error, self._error = self._error, None
        if error is not None and not isinstance(error, OSError):
            raise error

    def finish(self) -> None:
        """Wait for the current save and retry failed tasks once more. Raises OSError if they fail again."""
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
            while self._pending:
                name = next(iter(self._pending))
                self._pending[name]()
                del self._pending[name]
        except OSError as error:
            self._error = error
            if report:
                note(f"warning: {error}; training continues, and the next save retries")
        except BaseException as error:
            self._error = error


class SaveClock:
    """Whether a save within an epoch is due: N updates or M minutes after the last one. None disables either."""

    def __init__(self, *, updates: int | None, minutes: float | None) -> None:
        self._updates, self._seconds = updates, None if minutes is None else minutes * 60
        self.restart()

    @property
    def is_set(self) -> bool:
        """Whether a save within an epoch is ever due."""
        return self._updates is not None or self._seconds is not None

    def restart(self) -> None:
        """Start counting after a save."""
        self._num_updates, self._started = 0, time.monotonic()

    def is_due(self) -> bool:
        """Count an update; returns whether a save is due after it."""
        self._num_updates += 1
        if self._updates is not None and self._num_updates >= self._updates:
            return True
        return self._seconds is not None and time.monotonic() - self._started >= self._seconds
