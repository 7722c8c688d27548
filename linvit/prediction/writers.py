"""Files of predictions, written row by row: CSV, JSON lines or Parquet, by the file's extension."""

import csv
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

from linvit.output.files import cannot_write, scratch_of, sync_folder

Row: TypeAlias = dict[str, Any]
WriteRow: TypeAlias = Callable[[Row], None]

# The columns of a row; "labels" and "probabilities" are lists, which CSV spreads over columns of their own.
IMAGE_COLUMNS = ("path", "labels", "probabilities", "error")
TILE_COLUMNS = ("path", "top", "left", "height", "width", "labels", "probabilities")
_LISTS = {"labels": "label", "probabilities": "probability"}
# Rows that Parquet keeps together, and so that are held in memory.
_GROUP_SIZE = 4096


def check_format(path: Path) -> None:
    """Raises ValueError where files of such a kind cannot be written here."""
    if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: Parquet needs pyarrow; pip install pyarrow, or end the name in .csv or .jsonl")


@contextmanager
def open_rows(path: Path, columns: Sequence[str], *, topk: int) -> Iterator[WriteRow]:
    """A function that writes a row to the file, by its extension.

    JSON lines grow as rows come, so that a run that is stopped leaves all that it had; a file of another kind appears
    when it is whole, or not at all.

    Args:
        columns: the names in a row; a row that lacks one has nothing there.
        topk: length of the lists in a row.

    Raises OSError, naming the file, where it cannot be written.
    """
    kind = path.suffix.lower()
    place = path if kind == ".jsonl" else scratch_of(path)
    with _naming(path):
        file = place.open("wb")
    try:
        with _naming(path):
            rows = _WRITERS[kind](file, columns, topk)

        def write(row: Row) -> None:
            with _naming(path):
                rows.write(row)

        yield write
        with _naming(path):
            rows.finish()
            file.flush()
            os.fsync(file.fileno())
            file.close()
            place.replace(path)
            sync_folder(path.parent)
    except BaseException:
        # Closing writes what is left, and on a full disk fails again.
        with suppress(OSError):
            file.close()
        if place != path:
            place.unlink(missing_ok=True)
        raise


class _Rows(Protocol):
    def write(self, row: Row) -> None: ...

    def finish(self) -> None: ...


class _JsonLines:
    def __init__(self, file: BinaryIO, columns: Sequence[str], topk: int) -> None:
        self.file = file
        self.columns = columns

    def write(self, row: Row) -> None:
        line = json.dumps({name: row.get(name) for name in self.columns}, ensure_ascii=False) + "\n"
        # Bytes of a path that are no UTF-8 become JSON's own escapes.
        self.file.write(line.encode(errors="backslashreplace"))
        self.file.flush()

    def finish(self) -> None:
        pass


class _Csv:
    def __init__(self, file: BinaryIO, columns: Sequence[str], topk: int) -> None:
        self.columns = columns
        self.topk = topk
        self.text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        self.rows = csv.writer(self.text)
        self.rows.writerow([name for column in columns for name in self._names(column)])

    def write(self, row: Row) -> None:
        self.rows.writerow([value for column in self.columns for value in self._values(column, row.get(column))])

    def finish(self) -> None:
        # Else the text would close the file.
        self.text.detach()

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
        self.held: list[Row] = []

    def write(self, row: Row) -> None:
        self.held.append({**row, "path": valid_utf8(row["path"])})
        if len(self.held) == _GROUP_SIZE:
            self._write_held()

    def finish(self) -> None:
        self._write_held()
        self.file.close()

    def _write_held(self) -> None:
        if self.held:
            self.file.write_table(self.table_of(self.held, self.schema))
            self.held.clear()


_WRITERS: dict[str, Callable[[BinaryIO, Sequence[str], int], _Rows]] = {
    ".jsonl": _JsonLines,
    ".csv": _Csv,
    ".parquet": _Parquet,
}


def valid_utf8(path: str) -> str:
    """A path with its bytes that are no UTF-8 replaced."""
    return os.fsencode(path).decode(errors="replace")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
