"""ImageNet-style folders: one folder per split, in it one per class, in that the images at any depth."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from linvit.data.imageset import ImageSet
from linvit.data.read import EXTENSIONS, read_file

# Names under which a split is looked for, the asked one first.
_TRAIN_NAMES = ("train", "training")
_VALIDATION_NAMES = ("val", "validation", "valid", "test")


class ImageFolder(ImageSet):
    """The images of one split, in the order of their class and path.

    Paths are kept as one block of bytes, so that millions of them cost little to copy to worker processes.

    Args:
        root: folder of the split; paths are relative to it.
        split: the split's name.
        class_names: name of every label.
        relative_paths: path of every image, relative to `root`.
        labels: label of every image.
    """

    def __init__(
        self,
        root: Path,
        *,
        split: str,
        class_names: Sequence[str],
        relative_paths: Sequence[str],
        labels: Sequence[int],
    ) -> None:
        assert len(relative_paths) == len(labels)
        super().__init__(root, split=split, class_names=class_names, labels=labels)
        names = [os.fsencode(path) for path in relative_paths]
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def path(self, index: int) -> Path:
        """The image's file."""
        start = self._ends[index - 1] if index > 0 else 0
        return self.root / os.fsdecode(self._names[start : self._ends[index]])

    def read_bytes(self, index: int) -> bytes:
        return read_file(self.path(index))


def open_folder(
    data_dir: str | os.PathLike[str],
    *,
    split: str,
    class_names: Sequence[str] | None = None,
    missing_classes: Literal["refuse", "allow"] = "refuse",
) -> ImageFolder:
    """Finds the images and labels of a split.

    "train" also finds "training"; "val" and "validation" find "val", "validation", "valid" or "test". Classes are the
    folders in the split, sorted by name as torchvision sorts them; hidden files and folders are passed over.

    Args:
        data_dir: folder that holds the splits.
        split: name of the split.
        class_names: labels are given by name from this list (from a run or another split), whatever the folder holds.
        missing_classes: whether the split may lack classes of `class_names`.

    Raises:
        ValueError: for a missing split, a split without images, an empty class folder, a class that `class_names`
            does not have, or one that the split lacks.
    """
    root = _find_split(Path(data_dir), split)
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise ValueError(f"{root}: holds no class folders; put each class's images into a folder of its name")
    images = {name: sorted(_images_below(root, name)) for name in folders}
    empty = [name for name in folders if not images[name]]
    if len(empty) == len(folders):
        known = " ".join(EXTENSIONS)
        raise ValueError(f"{root}: holds no images in its class folders (looked for {known})")
    if empty:
        raise ValueError(f"{root}: no images of {_listed(empty)}; add images or remove the folder")
    if class_names is None:
        class_names = folders
    _check_classes(root, folders, class_names, missing_classes)
    label_of = {name: label for label, name in enumerate(class_names)}
    return ImageFolder(
        root,
        split=split,
        class_names=class_names,
        relative_paths=[path for name in folders for path in images[name]],
        labels=[label_of[name] for name in folders for _ in images[name]],
    )


def read_class_map(path: str | os.PathLike[str]) -> list[str]:
    """Reads a text file with one class name a line, in the order of the labels."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"class_map {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"class_map {path}: is not a UTF-8 text file with one class name a line") from error
    names = [line.strip() for line in lines if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"class_map {path}: names {_listed(twice)} more than once")
    if not names:
        raise ValueError(f"class_map {path}: is empty; write one class name a line")
    return names


def _find_split(data_dir: Path, split: str) -> Path:
    if not data_dir.is_dir():
        raise ValueError(f"{data_dir}: no such folder; give the folder that holds the splits (train, val)")
    if split == "train":
        names: tuple[str, ...] = _TRAIN_NAMES
    elif split in ("val", "validation"):
        names = (split, *(name for name in _VALIDATION_NAMES if name != split))
    else:
        names = (split,)
    for name in names:
        if (data_dir / name).is_dir():
            return data_dir / name
    here = sorted(entry.name for entry in os.scandir(data_dir) if entry.is_dir() and entry.name[0] != ".")
    found = f"it holds {_listed(here)}" if here else "it holds no folders"
    raise ValueError(f"{data_dir}: no split '{split}' (looked for {', '.join(names)}); {found}")


def _images_below(root: Path, folder: str) -> Iterable[str]:
    """Paths, relative to `root`, of the images in a folder of it at any depth."""
    for entry in os.scandir(root / folder):
        if entry.name.startswith("."):
            continue
        path = f"{folder}/{entry.name}"
        if entry.is_dir():
            yield from _images_below(root, path)
        elif entry.name.lower().endswith(EXTENSIONS):
            yield path


def _check_classes(root: Path, folders: list[str], class_names: Sequence[str], missing: str) -> None:
    unknown = sorted(set(folders) - set(class_names))
    if unknown:
        raise ValueError(
            f"{root}: {_listed(unknown)} is not among the {len(class_names)} known classes; "
            "rename or remove the folder, or train on data that has the class"
        )
    absent = sorted(set(class_names) - set(folders))
    if absent and missing == "refuse":
        raise ValueError(f"{root}: no folder for {_listed(absent)}; every split needs images of every class")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
