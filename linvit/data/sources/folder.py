"""ImageNet-style folders: SPLIT/CLASS/IMAGE, with images at any depth below their class folder."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from linvit.data.decode import EXTENSIONS, UnreadableImage, read_file
from linvit.data.sources.base import ImageSet, NoSuchSplit, PackedStrings, join_notes, split_names, split_note
from linvit.data.sources.classes import MissingClasses, number_classes, quoted

# Python searches no thousand folders one in another.
MAX_DEPTH = 250


class ImageFolder(ImageSet):
    """The images of one split, each in a separate file.

    Args:
        root: folder that the paths are relative to.
        split: name of the split.
        class_names: class name of every label.
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

    def num_bytes(self, index: int) -> int:
        try:
            return os.stat(self.path(index)).st_size
        except OSError as error:
            raise UnreadableImage(f"{self.path(index)}: cannot be read ({error.strerror})") from error

    def relative_names(self) -> Iterator[bytes]:
        return self._paths.encoded()


def open_folder(
    data_dir: str | os.PathLike[str],
    *,
    split: str,
    class_names: Sequence[str] | None = None,
    missing_classes: MissingClasses = "refuse",
) -> ImageFolder:
    """Find the images and labels of a split, sorted by class and path.

    "train" also finds "training"; "val" and "validation" find "val", "validation", "valid" or "test". The classes are
    the folders in the split, sorted by name as torchvision sorts them; hidden files and folders are ignored. A folder
    in a class folder is read once, however many links lead to it.

    Args:
        data_dir: folder that contains the splits.
        split: name of the split.
        class_names: class names of a run or another split, in label order; the split must not have others.
        missing_classes: whether the split may lack classes of `class_names`.

    Raises:
        ValueError: for a missing split, a split without images, an empty class folder, a folder or link that cannot be
            read, a class that is not in `class_names`, or one that the split lacks.
    """
    root = _find_split(Path(data_dir), split)
    folders = class_folders(root)
    if not folders:
        raise ValueError(
            f"{root}: holds no class folders; put the images of each class into a folder named after it, or write a "
            f"list {root.name}.csv beside it, with the columns path,label"
        )
    images = {name: sorted(_images_below(root, name, set())) for name in folders}
    empty = [name for name in folders if not images[name]]
    if len(empty) == len(folders):
        known = " ".join(EXTENSIONS)
        raise ValueError(f"{root}: holds no images in its class folders (looked for {known})")
    if empty:
        raise ValueError(f"{root}: no images of {quoted(empty)}; add images or remove the folder")
    classes = number_classes(folders, source=root, class_names=class_names, missing_classes=missing_classes)
    paths = [path for name in folders for path in images[name]]
    return ImageFolder(
        root,
        split=split,
        class_names=classes.names,
        relative_paths=paths,
        labels=[classes.label_of[name] for name in folders for _ in images[name]],
        note=join_notes(split_note(data_dir, split, root.name), _nesting_note(root, paths)),
    )


def _nesting_note(root: Path, paths: Sequence[str]) -> str:
    """A remark for the user if folders in class folders hold images; timm takes the innermost folder as the class."""
    nested = [path for path in paths if path.count("/") > 1]
    if not nested:
        return ""
    name, *_, inner, _ = nested[0].split("/")
    return (
        f"{root}: {len(nested):,} images in folders inside class folders have the class of the outer one, such "
        f"as {os.path.dirname(nested[0])}: class '{name}' (timm: '{inner}')"
    )


def class_folders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted, without hidden ones."""
    return sorted(entry.name for entry in list_folder(root) if not entry.name.startswith(".") and is_folder(entry))


def list_folder(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """The entries of a folder. Raises ValueError, naming the folder, if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror}); make it readable or remove it") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one. Raises ValueError, naming the entry, for a link to itself."""
    try:
        return entry.is_dir()
    except OSError as error:
        raise ValueError(f"{entry.path}: cannot be followed ({error.strerror}); remove the link") from error


def is_first_visit(folder: str | os.PathLike[str], visited: set[tuple[int, int]]) -> bool:
    """Whether a folder is not among the `visited` ones, and add it.

    Links can lead to a folder along exponentially many paths, so each folder is read once. Raises ValueError, naming
    the folder, if it cannot be followed or is nested too deeply.
    """
    if os.fspath(folder).count(os.sep) > MAX_DEPTH:
        raise ValueError(f"{folder}: is nested more than {MAX_DEPTH} folders deep; move it up or remove it")
    try:
        status = os.stat(folder)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror}); make it readable or remove it") from error
    found = status.st_dev, status.st_ino
    is_first = found not in visited
    visited.add(found)
    return is_first


def _find_split(data_dir: Path, split: str) -> Path:
    if not data_dir.is_dir():
        raise ValueError(f"{data_dir}: no such folder; give the folder that contains the splits (train, val)")
    names = split_names(split)
    for name in names:
        if (data_dir / name).is_dir():
            return data_dir / name
    folders = class_folders(data_dir)
    found = f"found {quoted(folders)}" if folders else "found no folders"
    raise NoSuchSplit(f"{data_dir}: no split '{split}' (looked for {', '.join(names)}); {found}")


def _images_below(root: Path, folder: str, visited: set[tuple[int, int]]) -> Iterable[str]:
    """Paths, relative to `root`, of the images at any depth in one of its folders; each folder is read once."""
    if not is_first_visit(root / folder, visited):
        return
    # In order of their names, so that the same of several links is followed each time.
    for entry in sorted(list_folder(root / folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        path = f"{folder}/{entry.name}"
        if is_folder(entry):
            if entry.is_symlink() and _links_to_parent(root / path):
                raise ValueError(f"{root / path}: links to a folder that contains it; remove the link")
            yield from _images_below(root, path, visited)
        elif entry.name.lower().endswith(EXTENSIONS):
            yield path


def _links_to_parent(link: Path) -> bool:
    """Whether a link points to a folder that contains it."""
    return link.parent.resolve().is_relative_to(link.resolve())
