"""Write predictions row by row as CSV, JSON lines or Parquet, by the file's extension, or as lines on stdout."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias

from linvit.output.cells import CsvWriter, Utf8
from linvit.output.files import json_text, scratch_of, sync_folder, target_of, valid_utf8, writing
from linvit.output.streams import is_stream, open_stream

Row: TypeAlias = dict[str, Any]
WriteRow: TypeAlias = Callable[[Row], None]

FORMATS = (".csv", ".jsonl", ".parquet")
# "labels" and "probabilities" are lists, which CSV spreads over several columns.
IMAGE_COLUMNS = ("path", "labels", "probabilities", "error")
HEATMAP_COLUMNS = ("path", "labels", "probabilities", "heatmap", "error")
# With --conformal; see `with_sets`.
SET_COLUMNS = ("label_set", "unsure")
TILE_COLUMNS = ("path", "top", "left", "height", "width", "labels", "probabilities")
_LISTS = {"labels": "label", "probabilities": "probability"}
# Rows per group of a Parquet file, which are held in memory.
_GROUP_SIZE = 4096


def with_sets(columns: tuple[str, ...]) -> tuple[str, ...]:
    """The columns of images with those of `--conformal`."""
    return (*columns[:-1], *SET_COLUMNS, columns[-1])


def format_of(path: Path) -> str:
    """The format of a file, by its extension; `-`, pipes and devices without one take CSV."""
    extension = path.suffix.lower()
    return ".csv" if extension not in FORMATS and is_stream(path) else extension


def check_format(path: Path) -> None:
    """Raise ValueError if a package for the file's format is missing."""
    if format_of(path) == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: Parquet needs pyarrow; pip install pyarrow, or choose a .csv or .jsonl file")


@contextmanager
def open_rows(
    path: Path, columns: Sequence[str], *, topk: int, json_lines: Literal["growing", "complete"] = "growing"
) -> Iterator[WriteRow]:
    """A function that writes a row to the file, in the format of its extension (see `format_of`).

    JSON lines are written as rows arrive, so a run that is interrupted leaves all finished rows. Other files appear
    when they are complete, or not at all, and so do JSON lines if requested. Pipes and stdout get rows as they arrive.

    Args:
        columns: the names in a row; a name that a row lacks stays empty.
        topk: length of the lists in a row.
        json_lines: whether a file of JSON lines grows under its name or appears when it is complete.

    Raises OSError, naming the file, if it cannot be written, or if another process is writing the same JSON lines.
    """
    with ExitStack() as files:
        with writing(path):
            file = files.enter_context(_open(path, is_growing=json_lines == "growing" and format_of(path) == ".jsonl"))
            rows = _WRITERS[format_of(path)](file, columns, topk)

        def write(row: Row) -> None:
            with writing(path):
                rows.write(row)
                if is_stream(path):
                    file.flush()

        yield write
        with writing(path):
            rows.finish()
            files.close()


@contextmanager
def _open(path: Path, *, is_growing: bool) -> Iterator[BinaryIO]:
    """Open a file that is complete when it gets its name, one that grows under its name, or a stream."""
    if is_stream(path):
        with open_stream(path) as stream:
            yield stream
        return
    target = target_of(path)
    place = target if is_growing else scratch_of(target)
    file = place.open("ab")
    try:
        if is_growing:
            lock(file)
        file.truncate(0)
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        if not is_growing:
            place.replace(target)
        sync_folder(target.parent)
    except BaseException:
        # Closing flushes the rest, which fails again on a full disk.
        with suppress(OSError):
            file.close()
        if not is_growing:
            place.unlink(missing_ok=True)
        raise


def lock(file: BinaryIO) -> None:
    """Lock a file until it is closed; raises OSError if another process holds the lock."""
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise OSError("another process is writing it") from None
    except OSError:
        # The file system has no locks.
        pass


class _Rows(Protocol):
    def write(self, row: Row) -> None: ...

    def finish(self) -> None: ...


class _JsonLines:
    def __init__(self, file: BinaryIO, columns: Sequence[str], topk: int) -> None:
        self.file = file
        self.columns = columns

    def write(self, row: Row) -> None:
        line = json_text({name: row.get(name) for name in self.columns}, indent=None, ensure_ascii=False)
        # Bytes of a path that are not UTF-8 become JSON escapes.
        self.file.write(line.encode(errors="backslashreplace"))
        self.file.flush()

    def finish(self) -> None:
        pass


class _Csv:
    def __init__(self, file: BinaryIO, columns: Sequence[str], topk: int) -> None:
        self.columns = columns
        self.topk = topk
        self.rows = CsvWriter(Utf8(file))
        self.rows.writerow([name for column in columns for name in self._names(column)])

    def write(self, row: Row) -> None:
        self.rows.writerow([value for column in self.columns for value in self._values(column, row.get(column))])

    def finish(self) -> None:
        pass

    def _names(self, column: str) -> list[str]:
        return [f"{_LISTS[column]}_{rank}" for rank in range(1, self.topk + 1)] if column in _LISTS else [column]

    def _values(self, column: str, value: Any) -> list[Any]:
        return list(value or [None] * self.topk) if column in _LISTS else [value]


class _Parquet:
    def __init__(self, file: BinaryIO, columns: Sequence[str], topk: int) -> None:
        import pyarrow
        import pyarrow.parquet

        types = {
            **dict.fromkeys(("top", "left", "height", "width"), pyarrow.int32()),
            "labels": pyarrow.list_(pyarrow.string()),
            "probabilities": pyarrow.list_(pyarrow.float32()),
        }
        self.schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in columns])
        self.table_of = pyarrow.Table.from_pylist
        self.file = pyarrow.parquet.ParquetWriter(file, self.schema)
        self.group: list[Row] = []

    def write(self, row: Row) -> None:
        self.group.append({name: _valid(value) for name, value in row.items()})
        if len(self.group) == _GROUP_SIZE:
            self._write_group()

    def finish(self) -> None:
        self._write_group()
        self.file.close()

    def _write_group(self) -> None:
        if self.group:
            self.file.write_table(self.table_of(self.group, self.schema))
            self.group.clear()


def _valid(value: Any) -> Any:
    """A value whose text is valid Unicode, also inside lists."""
    if isinstance(value, str):
        return valid_utf8(value)
    return list(map(_valid, value)) if isinstance(value, list | tuple) else value


_WRITERS: dict[str, Callable[[BinaryIO, Sequence[str], int], _Rows]] = {
    ".jsonl": _JsonLines,
    ".csv": _Csv,
    ".parquet": _Parquet,
}


def show_row(row: Row, *, show: Callable[[str], None]) -> None:
    """Print a line for a reader."""
    best = [f"{label} {100 * probability:.1f} %" for label, probability in zip(row["labels"], row["probabilities"])]
    error = [] if row["error"] is None else [row["error"]]
    unsure = [f"unsure: {row['label_set'] or 'no class fits'}"] if row.get("unsure") == "yes" else []
    show(f"{row['path']}: {'; '.join([*best, *unsure, *error])}")


def print_row(row: Row, *, columns: Sequence[str], topk: int, show: Callable[..., None]) -> None:
    """Print a line for a program: the columns of a CSV file, separated by tabs."""
    best = [*row["labels"], *map(str, row["probabilities"])] or [""] * (2 * topk)
    show(
        row["path"],
        *best,
        *(row.get(name) or "" for name in columns if name not in ("path", "labels", "probabilities")),
    )
