"""What commands show: tables on stdout, progress on stderr while that is a terminal."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Columns of a table that goes to a file or a pipe.
PAGE_WIDTH = 100


def page(width: int = PAGE_WIDTH) -> Console:
    """Where tables are printed: as wide as the terminal, or `width`."""
    return Console() if sys.stdout.isatty() else Console(width=width)


def progress_bar(console: Console | None = None) -> Progress:
    """A bar for each task, gone when it is done; on stderr unless told otherwise."""
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
