"""Reading images in several processes, in order, so that Ctrl-C and crashes end all of them."""

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

from linvit.data.workers import obey_parent_alone

State = TypeVar("State")
Task = TypeVar("Task")
Result = TypeVar("Result")

# Tasks handed out ahead, per process.
_AHEAD = 3
# As for the processes of the loader: forked where that is sound, since new ones import everything again.
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool(Generic[State]):
    """Runs functions of a module on tasks, in `workers` processes or, if that is 0, in this one.

    Args:
        context: entered once in every process; what it gives is the first argument of every call.
    """

    def __init__(self, workers: int, context: AbstractContextManager[State]) -> None:
        self._workers = workers
        self._context = context
        self._open = ExitStack()

    def __enter__(self) -> Self:
        if self._workers:
            self._executor = ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context(_START_METHOD),
                initializer=_start,
                initargs=(self._context,),
            )
            self._open.callback(self._executor.shutdown, cancel_futures=True)
            # Started now, before the process has threads of its own.
            self._executor.submit(os.getpid).result()
        else:
            self._state = self._open.enter_context(self._context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def map(self, function: Callable[[State, Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """The results, in the order of the tasks, few of which are under way at a time.

        Raises OSError where a process dies.
        """
        if not self._workers:
            yield from (function(self._state, task) for task in tasks)
            return
        under_way: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                under_way.append(self._executor.submit(_call, function, task))
                if len(under_way) > _AHEAD * self._workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool:
            raise OSError(
                "a process that reads images was ended by the system, perhaps for want of memory; "
                "give fewer --workers or a smaller --max-pixels"
            ) from None


# What `Pool.context` gave in this worker process.
_state: Any = None


def _start(context: AbstractContextManager[Any]) -> None:
    global _state
    obey_parent_alone()
    # Processes are the parallelism; more threads in each would fight over the same cores.
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _state = context.__enter__()


def _call(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_state, task)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
