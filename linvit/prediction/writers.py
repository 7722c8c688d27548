"""Write predictions row by row as CSV, JSON lines or Parquet, by the file's extension."""

import csv
import importlib.util
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

from linvit.output.files import cannot_write, json_text, scratch_of, sync_folder, valid_utf8

Row: TypeAlias = dict[str, Any]
WriteRow: TypeAlias = Callable[[Row], None]

# "labels" and "probabilities" are lists, which CSV spreads over several columns.
IMAGE_COLUMNS = ("path", "labels", "probabilities", "error")
TILE_COLUMNS = ("path", "top", "left", "height", "width", "labels", "probabilities")
_LISTS = {"labels": "label", "probabilities": "probability"}
# Rows per group of a Parquet file, which are held in memory.
_GROUP_SIZE = 4096


def check_format(path: Path) -> None:
    """Raise ValueError if a package for the file's format is missing."""
    if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: Parquet needs pyarrow; pip install pyarrow, or choose a .csv or .jsonl file")


@contextmanager
def open_rows(path: Path, columns: Sequence[str], *, topk: int) -> Iterator[WriteRow]:
    """A function that writes a row to the file, in the format of its extension.

    JSON lines are written as rows arrive, so a run that is interrupted leaves all finished rows. Other files appear
    when they are complete, or not at all.

    Args:
        columns: the names in a row; a name that a row lacks stays empty.
        topk: length of the lists in a row.

    Raises OSError, naming the file, if it cannot be written.
    """
    extension = path.suffix.lower()
    target = path if extension == ".jsonl" else scratch_of(path)
    with _naming(path):
        file = target.open("wb")
    try:
        with _naming(path):
            rows = _WRITERS[extension](file, columns, topk)

        def write(row: Row) -> None:
            with _naming(path):
                rows.write(row)

        yield write
        with _naming(path):
            rows.finish()
            file.flush()
            os.fsync(file.fileno())
            file.close()
            target.replace(path)
            sync_folder(path.parent)
    except BaseException:
        # Closing flushes the rest, which fails again on a full disk.
        with suppress(OSError):
            file.close()
        if target != path:
            target.unlink(missing_ok=True)
        raise


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
        self.text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        self.rows = csv.writer(self.text)
        self.rows.writerow([name for column in columns for name in self._names(column)])

    def write(self, row: Row) -> None:
        self.rows.writerow([value for column in self.columns for value in self._values(column, row.get(column))])

    def finish(self) -> None:
        # Otherwise the text wrapper would close the file.
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
        self.group: list[Row] = []

    def write(self, row: Row) -> None:
        self.group.append({**row, "path": valid_utf8(row["path"])})
        if len(self.group) == _GROUP_SIZE:
            self._write_group()

    def finish(self) -> None:
        self._write_group()
        self.file.close()

    def _write_group(self) -> None:
        if self.group:
            self.file.write_table(self.table_of(self.group, self.schema))
            self.group.clear()


_WRITERS: dict[str, Callable[[BinaryIO, Sequence[str], int], _Rows]] = {
    ".jsonl": _JsonLines,
    ".csv": _Csv,
    ".parquet": _Parquet,
}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn an OSError into one that names the file."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
