"""Printed output: tables on stdout, progress on stderr, and numbers in one format."""

import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from linvit.output.files import printable, reason
from linvit.output.streams import goes_to_stdout

# Columns of a table that goes to a file or a pipe.
PAGE_WIDTH = 100
# Where progress is printed as lines.
SECONDS_BETWEEN_LINES = 10.0
# A cell without a value.
EMPTY = "–"


@contextmanager
def _naming_stdout() -> Iterator[None]:
    """Turn an OSError of a print into one that says so; a closed pipe remains a BrokenPipeError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"cannot write to stdout: {reason(error)}") from error


class _Page(Console):
    def print(self, *objects: Any, **settings: Any) -> None:
        with _naming_stdout():
            super().print(*objects, **settings)

    def on_broken_pipe(self) -> None:
        # rich would end the process.
        raise BrokenPipeError


def page(width: int = PAGE_WIDTH, *, outputs: Iterable[Path | None] = ()) -> Console:
    """The console that tables are printed on, as wide as the terminal, or `width` columns in a pipe.

    It is stdout, or stderr if one of the `outputs`, the files that the command writes, is stdout.
    """
    stderr = any(map(goes_to_stdout, outputs))
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    # Names may contain rich's markup and :names: of emoji.
    return _Page(stderr=stderr, width=None if is_terminal else width, markup=False, emoji=False, highlight=False)


class _PlainTable(Table):
    """A table whose text is shown as it is, each cell on one line; a cell with a style or several lines is a `Text`."""

    def add_row(self, *cells: RenderableType | None, **settings: Any) -> None:
        super().add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells), **settings)


def table(columns: Sequence[str], *, text: Collection[str] = (), title: str | None = None) -> Table:
    """A table with these column headings: numbers to the right, the columns in `text` to the left and wrapped."""
    heading_of_table = None if title is None else Text(printable(title))
    made = _PlainTable(title=heading_of_table, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in columns:
        if heading in text:
            made.add_column(Text(printable(heading)), overflow="fold")
        else:
            made.add_column(Text(printable(heading)), justify="right", no_wrap=True)
    return made


def show_line(console: Console, text: str) -> None:
    """Print a line of `printable` text on a console, without wrapping it."""
    console.print(Text(printable(text)), soft_wrap=True)


def print_line(*texts: str) -> None:
    """Print `printable` texts on stdout, on one line with tabs between them, at once, even into a pipe."""
    with _naming_stdout():
        print(*map(printable, texts), sep="\t", flush=True)


def note(*texts: str) -> None:
    """Print `printable` texts on stderr, on one line with tabs between them, at once, even into a pipe."""
    print(*map(printable, texts), sep="\t", file=sys.stderr, flush=True)


class _PlainProgress(Progress):
    """Prints lines in place of bars, for a log file: how much is done, and the time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True, auto_refresh=False, get_time=time.perf_counter)
        self._last_line = self.get_time()

    def update(self, task_id: TaskID, **settings: Any) -> None:
        super().update(task_id, **settings)
        self._report(self.tasks[task_id])

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._report(self.tasks[task_id])

    def _report(self, task: Task) -> None:
        now = self.get_time()
        if now - self._last_line < SECONDS_BETWEEN_LINES or not task.total or not task.completed:
            return
        self._last_line = now
        seconds_left = (task.total - task.completed) * (task.elapsed or 0.0) / task.completed
        line = f"{task.description}  {task.completed:,.0f}/{task.total:,.0f}  left {format_duration(seconds_left)}"
        print(printable(line), file=self.console.file, flush=True)


def progress_bar(console: Console | None = None, *, is_shown: bool = True) -> Progress:
    """A bar for each task with the time left, on stderr by default; it is removed when the task is done.

    Where that is not a terminal, it prints a line every ten seconds.
    """
    console = console or Console(stderr=True)
    if is_shown and not console.is_terminal:
        return _PlainProgress(console)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A step of `convert` may take minutes, and the time left is estimated from the steps of this period.
    period = timedelta(hours=1).total_seconds()
    return Progress(*columns, console=console, speed_estimate_period=period, transient=True, disable=not is_shown)


def format_bytes(count: float | None) -> str:
    """1.23 GiB, 45 MiB or 6 KiB; a dash for None."""
    if count is None:
        return EMPTY
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 0), ("KiB", 2**10, 0)):
        if count >= size:
            return f"{count / size:,.{digits}f} {unit}"
    return f"{count:.0f} B"


def format_count(value: float | None) -> str:
    """Three significant digits and an SI prefix, as 1.23 M; a dash for None."""
    if value is None:
        return EMPTY
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def format_size(size: tuple[int, int] | list[int] | int) -> str:
    """An image size in pixels, height first: 384 for a square, else 768×512."""
    height, width = (size, size) if isinstance(size, int) else size
    return str(height) if height == width else f"{height}×{width}"


def format_lengths(k: int | Sequence[int] | None) -> str:
    """A layer's projected length; the range where heads differ, a dash for ordinary attention."""
    if k is None:
        return EMPTY
    return str(k) if isinstance(k, int) else f"{min(k)}…{max(k)}"
