"""Image lists in files: one line per image with its path, its label and optionally its split.

A list is a table (CSV, with commas, semicolons or tabs) or, as `.txt`, one of the lists of ImageNet's validation images
(see `linvit.data.sources.groundtruth`).
"""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from linvit.data.decode import EXTENSIONS
from linvit.data.sources.base import NoSuchSplit, join_notes, split_names, split_note
from linvit.data.sources.classes import CLASS_FILE, MissingClasses, number_labels, quoted
from linvit.data.sources.folder import ImageFolder
from linvit.data.sources.groundtruth import read_ground_truth
from linvit.output.cells import text_of_cell

# Extensions of lists.
LISTS = (".csv", ".tsv", ".txt")
# Names of the columns that are used, in lower case; of several in a list, the first here counts.
_PATHS = (
    *("path", "image_path", "img_path", "file_path", "filepath", "filename", "file_name", "file"),
    *("image", "image_name", "img", "image_id", "imageid", "id"),
)
_LABELS = ("label", "class", "class_name", "label_name", "target", "category", "labels", "predictionstring")
_SPLIT = "split"
# ImageNet's LOC_val_solution.csv: a label, then boxes.
_BOXES = "predictionstring"
_DELIMITERS = ",;\t"
# Values in the columns of a list with a column per class.
_ONE_HOT = {"0": False, "0.0": False, "1": True, "1.0": True}


class Row(NamedTuple):
    line: int
    path: str
    label: str
    # Empty if the list has no such column.
    split: str = ""


def open_list(
    file: Path,
    *,
    split: str,
    class_names: Sequence[str] | None = None,
    missing_classes: MissingClasses = "refuse",
) -> ImageFolder:
    """Read the images of a split from a list, in the order of its lines.

    The first line names the columns: a path (`path`, `image_path`, `filename`, `image`, `id`, ...), a label (`label`,
    `class`, ...) and optionally `split`. Instead of the label there may be a single other column, or a column per class
    with 1 for the label and 0 elsewhere. Labels are class names or numbers: see `number_labels`. A list without a
    column `split` is a single split, named after the file.

    Paths are absolute, or relative to the list's folder or to a folder in it that is named after the split, and may
    lack the extension.

    Args:
        file: the list.
        split: name of the split, or of the file.
        class_names: class names of a run or another split, in label order; the split must not have others.
        missing_classes: whether the split may lack classes of `class_names`.

    Raises:
        ValueError: naming the line, for an incomplete line and for an image that is listed twice or does not exist; for
            a list that is not UTF-8 text or lacks a column or the split; and as `number_labels` and
            `read_ground_truth` do.
    """
    rows, columns_note = _read_rows(file, split)
    found, rows = _select_split(file, rows, split)
    _refuse_other_encodings(file, rows)
    rows = _find_images(file, rows, dict.fromkeys([found, file.stem, *split_names(split)]))
    _refuse_repeats(file, rows)
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
        note=join_notes(split_note(file, split, found), columns_note, classes.note),
    )


def _read_rows(file: Path, split: str) -> tuple[list[Row], str]:
    """The rows of a list, and a remark about its columns for the user."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); restore the list") from error
    # File names may be in any encoding, but must then have the same bytes here.
    text = data.decode("utf-8-sig", "surrogateescape")
    if "\0" in text:
        raise _not_utf8(file)
    if file.suffix.lower() == ".txt" and not any(sign in text.partition("\n")[0] for sign in _DELIMITERS):
        return [Row(*row) for row in read_ground_truth(file, text, folders=split_names(split))], ""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), skipinitialspace=True, strict=True)
    try:
        table = _Table(file, next(reader, []))
        rows = [table.read(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        raise ValueError(f"{file}: line {reader.line_num}: is not valid CSV ({error}); correct the line") from error
    return rows, table.note


def _delimiter(text: str) -> str:
    """The delimiter that separates a column of paths from others in the first line; a comma if none does."""
    for delimiter in _DELIMITERS:
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True), [])
        if len(names) > 1 and {name.strip().lower() for name in names} & set(_PATHS):
            return delimiter
    return ","


class _Table:
    """Reads the rows of a list by the names of its columns."""

    def __init__(self, file: Path, header: Sequence[str]) -> None:
        self.file = file
        names = [name.strip() for name in header]
        known = {name.lower(): index for index, name in reversed(list(enumerate(names)))}
        path = next((known[name] for name in _PATHS if name in known), None)
        label = next((known[name] for name in _LABELS if name in known), None)
        split = known.get(_SPLIT)
        others = [index for index, name in enumerate(names) if name and index not in (path, split)]
        # A column per class, by index; empty if there is a column of labels.
        self.classes: dict[int, str] = {}
        self.note = ""
        if path is not None and label is None and len(others) == 1:
            label = others[0]
            self.note = f"{file}: labels are taken from the column '{names[label]}'"
        elif path is not None and label is None and len(others) > 1:
            self.classes = {index: names[index] for index in others}
            self.note = f"{file}: labels are taken from {len(others)} columns with 1 for the class"
        if path is None or (label is None and not self.classes):
            missing = [name for name, index in (("path", path), ("label", label)) if index is None]
            raise ValueError(
                f"{file}: no column {quoted(missing)} in the first line ({','.join(header)[:80]}); "
                "name the columns there, for example: path,label"
            )
        columns = {"path": path, "label": label, _SPLIT: split}
        self.columns = {name: index for name, index in columns.items() if index is not None}
        self.has_boxes = label is not None and names[label].lower() == _BOXES
        self.width = 1 + max(*self.columns.values(), *self.classes)

    def read(self, line: int, fields: Sequence[str]) -> Row:
        where = f"{self.file}: line {line}"
        if len(fields) < self.width:
            raise ValueError(f"{where}: has too few fields ({len(fields)}); write {','.join(self.columns)}")
        # The list may come from `linvit eval --csv`.
        values = {name: text_of_cell(fields[index].strip()) for name, index in self.columns.items()}
        if self.classes:
            values["label"] = self._one_hot_label(where, fields)
        for name, value in values.items():
            if not value:
                raise ValueError(f"{where}: has no {name}; fill it in or remove the line")
        if self.has_boxes:
            values["label"] = values["label"].split()[0]
        return Row(line, values["path"], values["label"], values.get(_SPLIT, ""))

    def _one_hot_label(self, where: str, fields: Sequence[str]) -> str:
        values = {name: fields[index].strip() for index, name in self.classes.items()}
        wrong = next((name for name, value in values.items() if value not in _ONE_HOT), None)
        if wrong is not None:
            raise ValueError(
                f"{where}: column '{wrong}' is {values[wrong]!r}, not 0 or 1, and the list has no column 'label'; name "
                "the column of labels 'label'"
            )
        labels = [name for name, value in values.items() if _ONE_HOT[value]]
        if len(labels) != 1:
            raise ValueError(f"{where}: has {len(labels)} classes; an image has one class: correct or remove the line")
        return labels[0]


def _select_split(file: Path, rows: list[Row], split: str) -> tuple[str, list[Row]]:
    """The name of the split in the list or of the list, and its rows."""
    if not rows:
        raise ValueError(f"{file}: lists no images; write one line per image below the column names")
    names = split_names(split)
    if split == file.name:
        return split, rows
    splits = sorted({row.split for row in rows if row.split})
    for name in names:
        if name in splits:
            return name, [row for row in rows if row.split == name]
    if not splits and (named := next((name for name in names if file.name in lists_of(name)), None)):
        return named, rows
    hint = f"found {quoted(splits)}" if splits else "give the folder of the list, or add a column 'split' to it"
    raise NoSuchSplit(f"{file}: no split '{split}' (looked for {', '.join(names)}); {hint}")


def lists_of(split: str) -> Iterator[str]:
    """Names of the files that may list a split, in order of preference: train.csv, LOC_val_solution.csv, ..."""
    yield from (f"{split}{extension}" for extension in LISTS)
    yield f"LOC_{split}_solution.csv"
    if split in ("val", "validation"):
        yield from ("val_map.txt", "imagenet_2012_validation_synset_labels.txt")
        yield "ILSVRC2012_validation_ground_truth.txt"


def _find_images(file: Path, rows: list[Row], folders: Sequence[str] | dict[str, None]) -> list[Row]:
    """The rows with the path of each image that exists, relative to the list. Raises ValueError if some do not."""
    finder = _Finder(file.parent, ["", *folders])
    found, missing = [], []
    for row in rows:
        path = finder.find(row.path)
        if path is None:
            missing.append(row)
        else:
            found.append(row._replace(path=path))
    if missing:
        first = min(missing)
        more = f" ({len(missing):,} of {len(rows):,} images are missing)" if len(missing) > 1 else ""
        raise ValueError(
            f"{file}: line {first.line}: {file.parent / first.path} does not exist{more}; restore it or remove the line"
        )
    return found


class _Finder:
    """Finds listed images in some folders. Listing each folder once is far faster than checking every file."""

    def __init__(self, root: Path, folders: Sequence[str]) -> None:
        self.root, self.folders = root, folders
        # By folder: its files, and its images by their name without extension.
        self._listings: dict[str, tuple[set[str], dict[str, list[str]]]] = {}

    def find(self, path: str) -> str | None:
        """The image's path relative to the root, in the first folder that has it; None if none has.

        A file is checked by itself only if no folder lists it: on a network file system each check takes a millisecond.
        """
        candidates = [os.path.join(folder, path) for folder in self.folders]
        for candidate in candidates:
            parent, name = os.path.split(candidate)
            if name in self._list(parent)[0]:
                return candidate
        for candidate in candidates:
            parent, name = os.path.split(candidate)
            _, by_stem = self._list(parent)
            if len(images := by_stem.get(name, [])) == 1:
                return os.path.join(parent, images[0])
            if images:
                raise ValueError(f"{self.root / candidate}: is one of {quoted(sorted(images))}; add the extension")
        # Some file systems ignore case, so a name that is not listed may still exist.
        return next((candidate for candidate in candidates if os.path.isfile(self.root / candidate)), None)

    def _list(self, folder: str) -> tuple[set[str], dict[str, list[str]]]:
        if folder not in self._listings:
            try:
                files = set(os.listdir(self.root / folder))
            except OSError:
                files = set()
            by_stem: dict[str, list[str]] = defaultdict(list)
            for name in files:
                stem, extension = os.path.splitext(name)
                if extension.lower() in EXTENSIONS:
                    by_stem[stem].append(name)
            self._listings[folder] = files, by_stem
        return self._listings[folder]


def _refuse_repeats(file: Path, rows: list[Row]) -> None:
    lines: dict[str, int] = {}
    for row in rows:
        first = lines.setdefault(row.path, row.line)
        if first != row.line:
            raise ValueError(f"{file}: line {row.line}: repeats {row.path} from line {first}; remove one of the lines")


def _refuse_other_encodings(file: Path, rows: list[Row]) -> None:
    """Raise ValueError if a label is not UTF-8, unless its image's path is not, either, as in a folder of that name."""
    if any(not _is_utf8(row.label) and _is_utf8(row.path) for row in rows):
        raise _not_utf8(file)


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _not_utf8(file: Path) -> ValueError:
    return ValueError(f"{file}: is not UTF-8 text; save the list as CSV in UTF-8")
