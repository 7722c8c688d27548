"""A progress bar on stderr, if that is a terminal, which what decoders print there does not disturb.

Reading images in several processes, in order, so that Ctrl-C and crashes end all of them.

Inspecting all images of a listing, a chunk at a time, into arrays with a row per image.
"""

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import cv2
import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID

from linvit.check.faults import Finding
from linvit.check.inspect import THUMBNAIL, DecoderMessages, inspect
from linvit.check.perceptual import hash_thumbnails
from linvit.data.decode import UnreadableImage
from linvit.data.worker import obey_parent_alone
from linvit.output.terminal import progress_bar


class ProgressBar:
    """To be entered before what decoders print is caught, which takes the place of stderr."""

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
        """A new bar."""
        # Starts a thread, so not before processes are forked.
        self._progress.start()
        return Stage(self._progress, self._progress.add_task(name, total=total))


class Stage:
    """One bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, steps: int) -> None:
        self._progress.advance(self._task, steps)


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


CHUNK = 32
SMALL = 16


class Source(Protocol):
    """Where images are read from; it is copied to every process."""

    def read(self, index: int, path: str) -> bytes:
        """The bytes of an image of the listing; UnreadableImage where it cannot be opened."""


class FolderSource:
    """Image files by their paths below a folder."""

    def __init__(self, root: Path) -> None:
        self._root = os.fspath(root)

    def read(self, index: int, path: str) -> bytes:
        file = os.path.join(self._root, path)
        try:
            # What `read_file` does, without the time that a Path takes.
            with open(file, "rb", buffering=0) as handle:
                return handle.read()
        except OSError as error:
            raise UnreadableImage(f"{file}: cannot be read ({error.strerror})") from error


class Reader:
    """What a process needs to inspect images; entered, it also catches what decoders print."""

    def __init__(self, source: Source, *, max_pixels: int) -> None:
        self.source = source
        self.max_pixels = max_pixels
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self.messages = self._open.enter_context(DecoderMessages())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()


@dataclass(frozen=True)
class Measurements:
    """A row per image: width and height (0 where it was not decoded), bytes, their checksum, a perceptual hash,
    a thumbnail (16, 16) uint8 grey, and the channels' means and mean squares (3,), 0 to 255: those of the pixels
    where an image was decoded whole.
    """

    sizes: np.ndarray
    num_bytes: np.ndarray
    checksums: np.ndarray
    hashes: np.ndarray
    thumbnails: np.ndarray
    means: np.ndarray
    squares: np.ndarray

    @classmethod
    def empty(cls, count: int) -> Self:
        return cls(
            sizes=np.zeros((count, 2), np.int32),
            num_bytes=np.zeros(count, np.int64),
            checksums=np.zeros(count, np.uint64),
            hashes=np.zeros(count, np.uint64),
            thumbnails=np.zeros((count, SMALL, SMALL), np.uint8),
            means=np.zeros((count, 3), np.float32),
            squares=np.zeros((count, 3), np.float32),
        )

    @property
    def decoded(self) -> np.ndarray:
        """Which images were decoded, (N,) bool."""
        return self.sizes[:, 0] > 0

    def fill(self, first: int, part: "Measurements") -> None:
        """Put the rows of `part` in place from `first` on."""
        for name, values in vars(part).items():
            getattr(self, name)[first : first + len(values)] = values


class _Task(NamedTuple):
    first: int
    paths: list[str]
    whole: np.ndarray


class _Result(NamedTuple):
    first: int
    findings: list[Finding]
    measurements: Measurements


def read_all(
    pool: Pool[Reader], paths: Sequence[str], whole: np.ndarray, on_images: Callable[[int], None]
) -> tuple[Measurements, list[Finding]]:
    """Inspect every image; `on_images` is told how many more are done.

    Those of `whole`, (N,) bool, are decoded whole, the others perhaps at a reduced size.
    """
    measurements = Measurements.empty(len(paths))
    findings: list[Finding] = []
    chunks = (slice(first, first + CHUNK) for first in range(0, len(paths), CHUNK))
    tasks = (_Task(chunk.start, list(paths[chunk]), whole[chunk]) for chunk in chunks)
    for result in pool.map(_inspect_chunk, tasks):
        measurements.fill(result.first, result.measurements)
        findings += result.findings
        on_images(len(result.measurements.sizes))
    return measurements, findings


def _inspect_chunk(reader: Reader, task: _Task) -> _Result:
    count = len(task.paths)
    rows = Measurements.empty(count)
    findings = []
    thumbnails = np.zeros((count, THUMBNAIL, THUMBNAIL), np.uint8)
    colours = np.zeros((2, count, 3))
    for row, (path, whole) in enumerate(zip(task.paths, task.whole.tolist())):
        try:
            data = reader.source.read(task.first + row, path)
        except UnreadableImage as error:
            cause = error.__cause__
            reason = cause.strerror.lower() if isinstance(cause, OSError) and cause.strerror else str(error)
            findings.append(Finding("unreadable_file", path, reason))
            continue
        inspection = inspect(data, path, max_pixels=reader.max_pixels, whole=whole, messages=reader.messages)
        findings += [Finding(code, path, detail) for code, detail in inspection.findings]
        rows.num_bytes[row], rows.checksums[row] = inspection.num_bytes, inspection.checksum
        pixels = inspection.pixels
        if pixels is not None:
            rows.sizes[row] = pixels.width, pixels.height
            colours[0, row], colours[1, row] = pixels.means[:, 0], pixels.deviations[:, 0]
            thumbnails[row] = pixels.thumbnail
    means, deviations = colours
    rows.means[:], rows.squares[:] = means, means**2 + deviations**2
    rows.hashes[:] = hash_thumbnails(thumbnails)
    # Averages of 2 x 2, which slices give ten times as fast as a sum over axes.
    parts = [thumbnails[:, i::2, j::2].astype(np.uint16) for i in (0, 1) for j in (0, 1)]
    rows.thumbnails[:] = sum(parts[1:], parts[0]) // 4
    return _Result(task.first, findings, rows)
