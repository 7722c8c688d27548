"""Lists of images in CSV files: a line of `path,label` per image, and perhaps of which split it is."""

import csv
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from linvit.data.sources.base import NoSuchSplit, split_names
from linvit.data.sources.classes import CLASS_FILE, MissingClasses, number_labels, quoted
from linvit.data.sources.folder import ImageFolder

_COLUMNS = ("path", "label", "split")


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    # "" where the list has no such column.
    split: str


def open_list(
    file: Path,
    *,
    split: str,
    class_names: Sequence[str] | None = None,
    missing_classes: MissingClasses = "refuse",
) -> ImageFolder:
    """Reads the images of a split from a list, in its order.

    Its first line names the columns: `path` (absolute, or relative to the list's folder), `label` (the class's name,
    or a number: see `number_labels`) and perhaps `split`; without that column, the list is one split, of its own name.

    Raises:
        ValueError: naming the line, for a row that is not complete, an image that is listed twice or does not exist;
            for a list that is no UTF-8 text or lacks columns or the split; and as `number_labels` does.
    """
    rows = _in_split(file, _read_rows(file), split)
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
        note=classes.note,
    )


def _read_rows(file: Path) -> list[_Row]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, skipinitialspace=True, strict=True)
            places = _find_columns(file, next(reader, []))
            return [_read_row(file, reader.line_num, fields, places) for fields in reader if fields]
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); restore the list") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 text; save the list as CSV in UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{file}: line {reader.line_num}: is not CSV ({error})") from error


def _find_columns(file: Path, header: Sequence[str]) -> dict[str, int]:
    """Where the columns stand by their names, of which `path` and `label` must be there."""
    columns = {name.strip().lower(): place for place, name in enumerate(header)}
    lacking = [name for name in ("path", "label") if name not in columns]
    if lacking:
        raise ValueError(
            f"{file}: no column {quoted(lacking)} in its first line ({','.join(header)[:80]}); "
            "name the columns there, as in: path,label"
        )
    return {name: columns[name] for name in _COLUMNS if name in columns}


def _read_row(file: Path, line: int, fields: Sequence[str], places: dict[str, int]) -> _Row:
    if len(fields) <= max(places.values()):
        raise ValueError(f"{file}: line {line}: has {len(fields)} fields, too few; write {','.join(places)}")
    values = {name: fields[place].strip() for name, place in places.items()}
    for name, value in values.items():
        if not value:
            raise ValueError(f"{file}: line {line}: has no {name}; fill it in or remove the line")
    return _Row(line, values["path"], values["label"], values.get("split", ""))


def _in_split(file: Path, rows: list[_Row], split: str) -> list[_Row]:
    if not rows:
        raise ValueError(f"{file}: lists no images; write a line for each below the names of the columns")
    names = split_names(split)
    if split == file.name or (not rows[0].split and file.stem in names):
        return rows
    splits = sorted({row.split for row in rows if row.split})
    for name in names:
        if name in splits:
            return [row for row in rows if row.split == name]
    there = f"it holds {quoted(splits)}" if splits else "give its folder, or give it a column 'split'"
    raise NoSuchSplit(f"{file}: no split '{split}' (looked for {', '.join(names)}); {there}")


def _refuse_repeats(file: Path, rows: list[_Row]) -> None:
    lines: dict[str, int] = {}
    for row in rows:
        first = lines.setdefault(row.path, row.line)
        if first != row.line:
            raise ValueError(f"{file}: line {row.line}: lists {row.path} again, as line {first} does; remove one")


def _refuse_missing(file: Path, rows: list[_Row]) -> None:
    # Each folder is listed once, which is far quicker than to ask for every file.
    in_folder: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        in_folder[os.path.dirname(row.path)].append(row)
    missing: list[_Row] = []
    for folder, members in in_folder.items():
        try:
            there = set(os.listdir(file.parent / folder))
        except OSError:
            there = set()
        # A name may also be found in another spelling, as on systems that ignore case.
        missing += [
            row for row in members if os.path.basename(row.path) not in there and not (file.parent / row.path).is_file()
        ]
    if missing:
        first = min(missing)
        more = f" ({len(missing):,} of {len(rows):,} images are missing)" if len(missing) > 1 else ""
        raise ValueError(
            f"{file}: line {first.line}: no file {file.parent / first.path}{more}; restore it or remove the line"
        )
