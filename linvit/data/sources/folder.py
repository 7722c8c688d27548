"""ImageNet-style folders: one folder per split, in it one per class, in that the images at any depth."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from linvit.data.decode import EXTENSIONS, read_file
from linvit.data.sources.base import ImageSet, NoSuchSplit, PackedStrings, split_names
from linvit.data.sources.classes import MissingClasses, number_classes, quoted


class ImageFolder(ImageSet):
    """The images of one split, each a file of its own.

    Args:
        root: folder of the split; paths are relative to it.
        split: the split's name.
        class_names: name of every label.
        relative_paths: path of every image, relative to `root`.
        labels: label of every image.
        note: see `ImageSet`.
    """

    def __init__(
        self,
        root: Path,
        *,
        split: str,
        class_names: Sequence[str],
        relative_paths: Sequence[str],
        labels: Sequence[int],
        note: str = "",
    ) -> None:
        assert len(relative_paths) == len(labels)
        super().__init__(root, split=split, class_names=class_names, labels=labels, note=note)
        self._paths = PackedStrings.pack(relative_paths)

    def path(self, index: int) -> Path:
        """The image's file."""
        return self.root / self._paths[index]

    def read_bytes(self, index: int) -> bytes:
        return read_file(self.path(index))


def open_folder(
    data_dir: str | os.PathLike[str],
    *,
    split: str,
    class_names: Sequence[str] | None = None,
    missing_classes: MissingClasses = "refuse",
) -> ImageFolder:
    """Finds the images and labels of a split, in the order of their class and path.

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
    folders = class_folders(root)
    if not folders:
        raise ValueError(f"{root}: holds no class folders; put each class's images into a folder of its name")
    images = {name: sorted(_images_below(root, name)) for name in folders}
    empty = [name for name in folders if not images[name]]
    if len(empty) == len(folders):
        known = " ".join(EXTENSIONS)
        raise ValueError(f"{root}: holds no images in its class folders (looked for {known})")
    if empty:
        raise ValueError(f"{root}: no images of {quoted(empty)}; add images or remove the folder")
    classes = number_classes(folders, source=root, class_names=class_names, missing_classes=missing_classes)
    return ImageFolder(
        root,
        split=split,
        class_names=classes.names,
        relative_paths=[path for name in folders for path in images[name]],
        labels=[classes.label_of[name] for name in folders for _ in images[name]],
    )


def class_folders(root: Path) -> list[str]:
    """The folders in a split's folder, sorted by name, but for hidden ones."""
    return sorted(entry.name for entry in list_folder(root) if not entry.name.startswith(".") and is_folder(entry))


def list_folder(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What lies in a folder; ValueError, naming it, where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror}); allow reading it or leave it out") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; ValueError, naming it, for a link that leads to itself."""
    try:
        return entry.is_dir()
    except OSError as error:
        raise ValueError(f"{entry.path}: cannot be followed ({error.strerror}); remove the link") from error


def _find_split(data_dir: Path, split: str) -> Path:
    if not data_dir.is_dir():
        raise ValueError(f"{data_dir}: no such folder; give the folder that holds the splits (train, val)")
    names = split_names(split)
    for name in names:
        if (data_dir / name).is_dir():
            return data_dir / name
    here = class_folders(data_dir)
    found = f"it holds {quoted(here)}" if here else "it holds no folders"
    raise NoSuchSplit(f"{data_dir}: no split '{split}' (looked for {', '.join(names)}); {found}")


def _images_below(root: Path, folder: str) -> Iterable[str]:
    """Paths, relative to `root`, of the images in a folder of it at any depth."""
    for entry in list_folder(root / folder):
        if entry.name.startswith("."):
            continue
        path = f"{folder}/{entry.name}"
        if is_folder(entry):
            if entry.is_symlink() and _leads_back(root / path):
                raise ValueError(f"{root / path}: is a link that leads round in circles; remove it")
            yield from _images_below(root, path)
        elif entry.name.lower().endswith(EXTENSIONS):
            yield path


def _leads_back(link: Path) -> bool:
    """Whether a link to a folder leads to one that it lies in."""
    return link.parent.resolve().is_relative_to(link.resolve())
