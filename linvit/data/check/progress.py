"""A progress bar on stderr, if that is a terminal, which what decoders print there does not disturb."""

import os
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, TaskID

from linvit.terminal import progress_bar


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
