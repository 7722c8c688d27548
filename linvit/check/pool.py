"""A pool of worker processes, and a progress bar for their work."""

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import cv2
from rich.console import Console
from rich.progress import Progress, TaskID

from linvit.data.signals import ignore_outside_signals
from linvit.output.terminal import progress_bar

# Tasks submitted ahead, per process.
_TASKS_AHEAD = 3
# As for the loader's workers: fork where it is safe, because new processes import everything again.
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"

State = TypeVar("State")
Task = TypeVar("Task")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool(Generic[State]):
    """Processes that run functions on tasks, and end together on Ctrl-C or a crash.

    Args:
        workers: number of processes; 0 runs everything in the main process.
        context: entered once in each process; its value is the first argument of every call.
    """

    def __init__(self, workers: int, context: AbstractContextManager[State]) -> None:
        self._workers = workers
        self._context = context
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._workers:
            self._executor = ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context(_START_METHOD),
                initializer=_start_process,
                initargs=(self._context,),
            )
            self._stack.callback(self._executor.shutdown, cancel_futures=True)
            # Starts the processes now, before this one has threads of its own.
            self._executor.submit(os.getpid).result()
        else:
            self._state = self._stack.enter_context(self._context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def map(self, function: Callable[[State, Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """The results in the order of the tasks; only a few tasks are in progress at a time.

        Raises OSError if a process dies.
        """
        if not self._workers:
            yield from (function(self._state, task) for task in tasks)
            return
        pending: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                pending.append(self._executor.submit(_call, function, task))
                if len(pending) > _TASKS_AHEAD * self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise OSError(
                "the system killed a process that reads images, perhaps because memory ran out; "
                "lower --workers or --max-pixels"
            ) from None


# Value of the pool's context in this process.
_state: Any = None


def _start_process(context: AbstractContextManager[Any]) -> None:
    global _state
    ignore_outside_signals()
    # The processes already use all cores; more threads would only compete for them.
    cv2.setNumThreads(0)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _state = context.__enter__()


def _call(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_state, task)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class ProgressBar:
    """The progress on stderr.

    It must be entered before `Reader` or `Pool`, which redirect stderr to capture what decoders print.
    """

    def __enter__(self) -> Self:
        self._stderr = os.fdopen(os.dup(2), "w")
        self._progress = progress_bar(Console(file=self._stderr))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._stderr.close()

    def stage(self, name: str, total: int) -> "Stage":
        """Add a bar."""
        # Starts a thread, so only after the processes are forked.
        self._progress.start()
        return Stage(self._progress, self._progress.add_task(name, total=total))


class Stage:
    """One bar of a progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, steps: int) -> None:
        self._progress.advance(self._task, steps)
