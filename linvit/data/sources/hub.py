"""Hugging Face data sets, read with the package `datasets`: by name from the hub, or from a folder or file."""

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from linvit.data.decode import UnreadableImage, read_file
from linvit.data.sources.base import ImageSet, NoSuchSplit, join_notes, split_names, split_note
from linvit.data.sources.classes import CLASS_FILE, MissingClasses, number_classes, number_labels, quoted
from linvit.output.files import reason
from linvit.settings.yaml import parse_yaml

# Marks DATA as a Hugging Face data set.
PREFIX = "hf:"
# Label columns without the feature ClassLabel; WebDatasets on the hub have the second.
_LABEL_COLUMNS = ("label", "cls")
# Where a folder describes its files, in the header of a Markdown file and in YAML.
_CARD, _CONFIG = "README.md", ".huggingface.yaml"
# Some messages of `datasets` list all the extensions that there are.
_LONGEST_REASON = 200


class HubImages(ImageSet):
    """The images of one split of a data set, in the order of its rows.

    Args:
        root: the set as the user wrote it.
        split: name of the split in the set.
        rows: `datasets.Dataset` with a column of encoded images, `datasets.Image(decode=False)`.
        column: name of that column.
        class_names: class name of every label.
        labels: label of every image.
        note: see `ImageSet`.
    """

    def __init__(
        self,
        root: Path,
        *,
        split: str,
        rows: Any,
        column: str,
        class_names: Sequence[str],
        labels: Sequence[int],
        note: str = "",
    ) -> None:
        super().__init__(root, split=split, class_names=class_names, labels=labels, note=note)
        self._rows = rows
        self._column = column

    def path(self, index: int) -> Path:
        """The set, the split and the number of the row, from 0."""
        return self.root / self.split / str(index)

    def read_bytes(self, index: int) -> bytes:
        image = self._rows[index][self._column]
        if image is None:
            raise UnreadableImage(f"{self.path(index)}: is empty; add the image or remove the row")
        data: bytes | None = image["bytes"]
        return read_file(image["path"]) if data is None else data


def open_hub(
    data: str,
    *,
    split: str,
    class_names: Sequence[str] | None = None,
    missing_classes: MissingClasses = "refuse",
) -> HubImages:
    """Open a split of a data set.

    The images are the only column with the feature `Image`, or the one of these named `image`. The labels are the only
    column with the feature `ClassLabel`, or else the column `label` or `cls`, of names or whole numbers (see
    `number_labels`).

    Args:
        data: hf:NAME, hf:NAME:CONFIG, hf:FOLDER or hf:FILE.parquet.
        split: name of the split.
        class_names: class names of a run or another split, in label order; the split must not have others.
        missing_classes: whether the split may lack classes of `class_names`.

    Raises:
        ValueError: if the package `datasets` is missing, the set cannot be loaded, lacks the split or a column, or has
            rows without a label; and as `number_labels` does.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f'{data}: needs the package datasets; install it with: pip install "linvit[hf]"') from error
    name, rows = _load(data, split)
    source = f"{data}/{name}"
    images = _image_column(source, rows)
    column = _label_column(source, rows)
    label = rows.features[column]
    codes = rows.select_columns([column])[:][column]
    unlabelled = next((row for row, code in enumerate(codes) if code is None or code == -1), None)
    if unlabelled is not None:
        raise ValueError(f"{source}: row {unlabelled} has no label; choose a split with labels")
    if isinstance(label, datasets.ClassLabel):
        names = [label.names[code] for code in codes]
        classes = number_classes(
            set(names), source=source, class_names=class_names or label.names, missing_classes=missing_classes
        )
    else:
        names = [_as_label(source, column, code) for code in codes]
        classes = number_labels(
            set(names),
            source=source,
            class_names=class_names,
            missing_classes=missing_classes,
            class_file=Path(data.removeprefix(PREFIX)) / CLASS_FILE,
        )
    return HubImages(
        Path(data),
        split=name,
        rows=rows.select_columns([images]).cast_column(images, datasets.Image(decode=False)),
        column=images,
        class_names=classes.names,
        labels=[classes.label_of[name] for name in names],
        note=join_notes(split_note(data, split, name), classes.note),
    )


def _load(data: str, split: str) -> tuple[str, Any]:
    """The name of the split in the set, and its rows."""
    name, config = _name_and_config(data.removeprefix(PREFIX))
    try:
        splits = _open_splits(Path(name), name, config)
        found = next((each for each in split_names(split) if each in splits), None)
        if found is not None:
            return found, splits[found]()
    except Exception as error:
        # The package raises errors of the network, of Arrow and of its own classes.
        raise ValueError(f"{data}: cannot be loaded ({type(error).__name__}: {_short(error)})") from error
    raise NoSuchSplit(
        f"{data}: no split '{split}' (looked for {', '.join(split_names(split))}); found {quoted(list(splits))}"
    )


def _short(error: Exception) -> str:
    return textwrap.shorten(reason(error), _LONGEST_REASON, placeholder=" …")


def _open_splits(path: Path, name: str, config: str | None) -> dict[str, Callable[[], Any]]:
    """A function for each split that loads it."""
    import datasets

    if (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(name)
        return {split: partial(saved.__getitem__, split) for split in saved}
    if (path / "state.json").is_file():
        rows = datasets.load_from_disk(name)
        return {str(rows.split or path.name): lambda: rows}
    if path.is_dir():
        _refuse_remote_files(path)
    if path.is_file():
        kind, split = path.suffix.removeprefix("."), re.split(r"[-_.]\d", path.name)[0].removesuffix(path.suffix)
        return {split: partial(datasets.load_dataset, kind, data_files={split: name}, split=split)}
    return {
        split: partial(datasets.load_dataset, name, config, split=split)
        for split in datasets.get_dataset_split_names(name, config)
    }


def _refuse_remote_files(folder: Path) -> None:
    """Raise ValueError if a folder's own description names files on the network, which `datasets` would fetch."""
    for name in (_CARD, _CONFIG):
        file = folder / name
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if name == _CARD:
            header = re.match(r"\s*---[ \t]*\r?\n(.*?)\n---", text, re.DOTALL)
            text = "" if header is None else header[1]
        settings = parse_yaml(text)
        configs = settings.get("configs") if isinstance(settings, dict) else None
        remote = next((each for each in _texts(configs) if "://" in each or "::" in each), None)
        if remote is not None:
            raise ValueError(f"{file} names {remote!r}, and a file cannot start a download: give files of the folder")


def _texts(value: Any) -> Iterator[str]:
    """All text inside lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _name_and_config(written: str) -> tuple[str, str | None]:
    name, colon, config = written.rpartition(":")
    return (written, None) if not colon or Path(written).exists() else (name, config)


def _image_column(source: str, rows: Any) -> str:
    import datasets

    candidates = _columns_with(rows, datasets.Image)
    if "image" in candidates:
        return "image"
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise ValueError(
            f"{source}: has several columns with the feature Image ({quoted(candidates)}); rename one to 'image'"
        )
    raise ValueError(
        f"{source}: has no column with the feature Image (columns: {quoted(rows.column_names)}); cast one to Image"
    )


def _label_column(source: str, rows: Any) -> str:
    import datasets

    candidates = _columns_with(rows, datasets.ClassLabel)
    if len(candidates) == 1:
        return candidates[0]
    for name in _LABEL_COLUMNS:
        if name in rows.column_names:
            return name
    if candidates:
        raise ValueError(
            f"{source}: has several columns with the feature ClassLabel ({quoted(candidates)}); rename one to 'label'"
        )
    raise ValueError(
        f"{source}: has no column with the feature ClassLabel and none named 'label' or 'cls' (columns: "
        f"{quoted(rows.column_names)}); rename the column of labels to 'label'"
    )


def _columns_with(rows: Any, feature: type) -> list[str]:
    return [name for name, each in rows.features.items() if isinstance(each, feature)]


def _as_label(source: str, column: str, value: Any) -> str:
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise ValueError(
            f"{source}: column '{column}' holds {value!r}, neither a name nor a whole number; convert the labels"
        )
    return str(value)
