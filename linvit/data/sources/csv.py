"""Image lists in CSV files: one line per image with its path, its label and optionally its split."""

import csv
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from linvit.data.sources.base import NoSuchSplit, join_notes, split_names, split_note
from linvit.data.sources.classes import CLASS_FILE, MissingClasses, number_labels, quoted
from linvit.data.sources.folder import ImageFolder
from linvit.output.cells import text_of_cell

_COLUMNS = ("path", "label", "split")


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    # Empty if the list has no such column.
    split: str


def open_list(
    file: Path,
    *,
    split: str,
    class_names: Sequence[str] | None = None,
    missing_classes: MissingClasses = "refuse",
) -> ImageFolder:
    """Read the images of a split from a list, in the order of its lines.

    The first line names the columns: `path` (absolute, or relative to the list's folder), `label` (a class name, or a
    number: see `number_labels`) and optionally `split`. A list without that column is a single split, named after the
    file.

    Args:
        file: the list.
        split: name of the split, or of the file.
        class_names: class names of a run or another split, in label order; the split must not have others.
        missing_classes: whether the split may lack classes of `class_names`.

    Raises:
        ValueError: naming the line, for an incomplete line and for an image that is listed twice or does not exist; for
            a list that is not UTF-8 text or lacks a column or the split; and as `number_labels` does.
    """
    found, rows = _select_split(file, _read_rows(file), split)
    _refuse_repeats(file, rows)
    _refuse_missing(file, rows)
    classes = number_labels(
        {row.label for row in rows},
        source=file,
        class_names=class_names,
        missing_classes=missing_classes,
        class_file=file.parent / CLASS_FILE,
    )
    return ImageFolder(
        file.parent,
        split=split,
        class_names=classes.names,
        relative_paths=[row.path for row in rows],
        labels=[classes.label_of[row.label] for row in rows],
        note=join_notes(split_note(file, split, found), classes.note),
    )


def _read_rows(file: Path) -> list[_Row]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, skipinitialspace=True, strict=True)
            columns = _find_columns(file, next(reader, []))
            return [_read_row(file, reader.line_num, fields, columns) for fields in reader if fields]
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); restore the list") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 text; save the list as CSV in UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{file}: line {reader.line_num}: is not valid CSV ({error}); correct the line") from error


def _find_columns(file: Path, header: Sequence[str]) -> dict[str, int]:
    """Index of each column that is used; `path` and `label` are required."""
    columns = {name.strip().lower(): index for index, name in enumerate(header)}
    missing = [name for name in ("path", "label") if name not in columns]
    if missing:
        raise ValueError(
            f"{file}: no column {quoted(missing)} in the first line ({','.join(header)[:80]}); "
            "name the columns there, for example: path,label"
        )
    return {name: columns[name] for name in _COLUMNS if name in columns}


def _read_row(file: Path, line: int, fields: Sequence[str], columns: dict[str, int]) -> _Row:
    if len(fields) <= max(columns.values()):
        raise ValueError(f"{file}: line {line}: has too few fields ({len(fields)}); write {','.join(columns)}")
    # The list may come from `linvit eval --csv`.
    values = {name: text_of_cell(fields[index].strip()) for name, index in columns.items()}
    for name, value in values.items():
        if not value:
            raise ValueError(f"{file}: line {line}: has no {name}; fill it in or remove the line")
    return _Row(line, values["path"], values["label"], values.get("split", ""))


def _select_split(file: Path, rows: list[_Row], split: str) -> tuple[str, list[_Row]]:
    """The name of the split in the list or of the list, and its rows."""
    if not rows:
        raise ValueError(f"{file}: lists no images; write one line per image below the column names")
    names = split_names(split)
    if split == file.name:
        return split, rows
    if not rows[0].split and file.stem in names:
        return file.stem, rows
    splits = sorted({row.split for row in rows if row.split})
    for name in names:
        if name in splits:
            return name, [row for row in rows if row.split == name]
    hint = f"found {quoted(splits)}" if splits else "give the folder of the list, or add a column 'split' to it"
    raise NoSuchSplit(f"{file}: no split '{split}' (looked for {', '.join(names)}); {hint}")


def _refuse_repeats(file: Path, rows: list[_Row]) -> None:
    lines: dict[str, int] = {}
    for row in rows:
        first = lines.setdefault(row.path, row.line)
        if first != row.line:
            raise ValueError(f"{file}: line {row.line}: repeats {row.path} from line {first}; remove one of the lines")


def _refuse_missing(file: Path, rows: list[_Row]) -> None:
    # Listing each folder once is far faster than checking every file.
    in_folder: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        in_folder[os.path.dirname(row.path)].append(row)
    missing: list[_Row] = []
    for folder, members in in_folder.items():
        try:
            files = set(os.listdir(file.parent / folder))
        except OSError:
            files = set()
        # Some file systems ignore case, so a name that is not listed may still exist.
        missing += [
            row for row in members if os.path.basename(row.path) not in files and not (file.parent / row.path).is_file()
        ]
    if missing:
        first = min(missing)
        more = f" ({len(missing):,} of {len(rows):,} images are missing)" if len(missing) > 1 else ""
        raise ValueError(
            f"{file}: line {first.line}: {file.parent / first.path} does not exist{more}; restore it or remove the line"
        )
