"""Image sets of Hugging Face's `datasets`: by their name on the hub, or in a folder or file."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from linvit.data.decode import UnreadableImage, read_file
from linvit.data.sources.base import ImageSet, NoSuchSplit, split_names
from linvit.data.sources.classes import CLASS_FILE, MissingClasses, number_classes, number_labels, quoted
from linvit.output.files import reason

# What DATA begins with for such a set.
PREFIX = "hf:"
# Names of a plain column of labels; the second is that of WebDataset's on the hub.
_LABEL_COLUMNS = ("label", "cls")


class HubImages(ImageSet):
    """The images of one split of a `datasets.Dataset`, in its order.

    Args:
        root: how the set was written.
        split: the split's name in it.
        rows: the images as files, encoded: a column of `datasets.Image(decode=False)`.
        column: that column.
        class_names: name of every label.
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
        """The set, the split and the number of the row, from 0 on."""
        return self.root / self.split / str(index)

    def read_bytes(self, index: int) -> bytes:
        image = self._rows[index][self._column]
        if image is None:
            raise UnreadableImage(f"{self.path(index)}: is empty; fill or remove the row")
        data: bytes | None = image["bytes"]
        return read_file(image["path"]) if data is None else data


def open_hub(
    data: str,
    *,
    split: str,
    class_names: Sequence[str] | None = None,
    missing_classes: MissingClasses = "refuse",
) -> HubImages:
    """Opens a split of a set that is written as hf:NAME, hf:NAME:CONFIG, hf:FOLDER or hf:FILE.parquet.

    Images are the only column of images, or the one called `image`; labels the only `ClassLabel`, or the column
    `label` or `cls`, of names or whole numbers (see `number_labels`).

    Raises:
        ValueError: where the package `datasets` is missing, the set cannot be loaded, has no such split or columns, or
            rows without a label; and as `number_classes` does.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f'{data}: needs the package datasets: pip install "linvit[hf]"') from error
    name, rows = _load(data, split)
    source = f"{data}/{name}"
    images = _image_column(source, rows, _columns_of(rows, datasets.Image))
    column = _label_column(source, rows, _columns_of(rows, datasets.ClassLabel))
    label = rows.features[column]
    codes = rows.select_columns([column])[:][column]
    nameless = next((row for row, code in enumerate(codes) if code is None or code == -1), None)
    if nameless is not None:
        raise ValueError(f"{source}: row {nameless} has no label; give a split whose images are labelled")
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
        note=classes.note,
    )


def _load(data: str, split: str) -> tuple[str, Any]:
    """The split's own name and its rows."""
    name, config = _name_and_config(data.removeprefix(PREFIX))
    try:
        splits = _open_splits(Path(name), name, config)
        found = next((each for each in split_names(split) if each in splits), None)
        if found is not None:
            return found, splits[found]()
    except Exception as error:
        # The library lets through errors of the network, of Arrow and of its own.
        raise ValueError(f"{data}: cannot be loaded ({type(error).__name__}: {reason(error)})") from error
    raise NoSuchSplit(
        f"{data}: no split '{split}' (looked for {', '.join(split_names(split))}); it holds {quoted(list(splits))}"
    )


def _open_splits(path: Path, name: str, config: str | None) -> dict[str, Callable[[], Any]]:
    """The splits by name, and how each is loaded."""
    import datasets

    if (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(name)
        return {split: partial(saved.__getitem__, split) for split in saved}
    if (path / "state.json").is_file():
        rows = datasets.load_from_disk(name)
        return {str(rows.split or path.name): lambda: rows}
    if path.is_file():
        kind, split = path.suffix.removeprefix("."), re.split(r"[-_.]\d", path.name)[0].removesuffix(path.suffix)
        return {split: partial(datasets.load_dataset, kind, data_files={split: name}, split=split)}
    return {
        split: partial(datasets.load_dataset, name, config, split=split)
        for split in datasets.get_dataset_split_names(name, config)
    }


def _name_and_config(written: str) -> tuple[str, str | None]:
    name, colon, config = written.rpartition(":")
    return (written, None) if not colon or Path(written).exists() else (name, config)


def _image_column(source: str, rows: Any, of_kind: Sequence[str]) -> str:
    if len(of_kind) == 1 or "image" in of_kind:
        return "image" if "image" in of_kind else of_kind[0]
    found = f"has several: {quoted(of_kind)}" if of_kind else f"has {quoted(rows.column_names)}"
    raise ValueError(f"{source}: needs one column with the feature Image, but {found}; cast it, or call it 'image'")


def _label_column(source: str, rows: Any, of_kind: Sequence[str]) -> str:
    if len(of_kind) == 1:
        return of_kind[0]
    for name in _LABEL_COLUMNS:
        if name in rows.column_names:
            return name
    found = f"has several: {quoted(of_kind)}" if of_kind else f"has {quoted(rows.column_names)}"
    raise ValueError(f"{source}: needs one column with the feature ClassLabel, or 'label', but {found}; rename it")


def _columns_of(rows: Any, kind: type) -> list[str]:
    return [name for name, feature in rows.features.items() if isinstance(feature, kind)]


def _as_label(source: str, column: str, value: Any) -> str:
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise ValueError(f"{source}: column '{column}' holds {value!r}, which is neither a name nor a whole number")
    return str(value)
