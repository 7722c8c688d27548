"""The splits, classes and images of DATA as training sees them, and the files that training ignores."""

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

from linvit.check.faults import Finding
from linvit.check.header import HEAD_BYTES, format_of
from linvit.check.reader import FolderSource, Source
from linvit.data.decode import EXTENSIONS
from linvit.data.sources.base import ImageSet, NoSuchSplit, split_names
from linvit.data.sources.folder import MAX_DEPTH
from linvit.data.sources.hub import PREFIX
from linvit.data.sources.open import open_images

Layout = Literal["splits", "classes", "images", "lists"]

_SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {*split_names("train"), *split_names("val")}


class ImageEntry(NamedTuple):
    """An image: its path relative to DATA, its split ("" without splits) and its class (None without classes)."""

    path: str
    split: str
    class_name: str | None


@dataclass
class Listing:
    """The contents of DATA. `classes` counts images by split and class; a split without classes has an empty dict."""

    layout: Layout
    images: list[ImageEntry] = field(default_factory=list)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def open_source(data: Path) -> tuple[Listing, Source]:
    """The listing of DATA, and a source that reads its images.

    Raises ValueError if there are no images, or if a list or tar file is invalid.
    """
    if _is_image_folder(data):
        return scan(data), FolderSource(data)
    return _open_sets(data)


def scan(root: Path) -> Listing:
    """List every file below a folder. Links are followed, as in training, except where they form a loop.

    Raises ValueError if the folder contains no images.
    """
    walk = _Walk(root, Listing(_detect_layout(root)))
    listing = walk.listing
    if listing.layout == "splits":
        entries = walk.entries("")
        walk.files(entries, "", "", None, code="loose_image")
        for entry in filter(_is_folder, entries):
            walk.split(entry.name, entry.name)
    else:
        walk.split("", "")
    if not listing.images:
        raise ValueError(f"{root}: contains no images (looked for {' '.join(EXTENSIONS)})")
    return listing


def _detect_layout(root: Path) -> Layout:
    folders = [entry for entry in _visible(root) if _is_folder(entry)]
    if not folders:
        return "images"
    inside = {folder.name: _visible(folder.path) for folder in folders}
    has_folders = {name for name, entries in inside.items() if any(map(_is_folder, entries))}
    has_images = {name for name, entries in inside.items() if any(map(_is_image, entries))}
    # A class may be called "valid" or "test", so a name alone does not make a folder a split.
    if has_folders & _SPLIT_NAMES or inside.keys() <= _SPLIT_NAMES:
        return "splits"
    return "splits" if has_folders and not has_images else "classes"


class _Walk:
    """Adds the images and findings below a folder to a listing."""

    def __init__(self, root: Path, listing: Listing) -> None:
        self.root = root
        self.real_root = os.path.realpath(root)
        self.listing = listing

    def split(self, path: str, split: str) -> None:
        """List a folder that contains class folders, or only images."""
        entries = self.entries(path)
        counts = self.listing.classes[split] = {}
        for entry in filter(_is_folder, entries):
            before = len(self.listing.images)
            self._class_folder(_join(path, entry.name), split, entry.name, {os.path.realpath(self.root / path)}, {})
            counts[entry.name] = len(self.listing.images) - before
        self.files(entries, path, split, None, code="loose_image" if counts else None)

    def entries(self, path: str) -> list[os.DirEntry[str]]:
        """The visible entries of a folder, sorted by name. Problems with entries and names become findings."""
        try:
            with os.scandir(self.root / path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._report("unreadable_folder", path or ".", (error.strerror or "").lower())
            return []
        visible = []
        first: dict[str, str] = {}
        for entry in found:
            entry_path = _join(path, entry.name)
            if entry.name.startswith("."):
                self._report("hidden", entry_path)
                continue
            if _links_to_itself(entry):
                self._report("link_loop", entry_path, "links to itself")
                continue
            visible.append(entry)
            twin = first.setdefault(entry.name.lower(), entry.name)
            # Class names are compared across all splits instead, in `check_classes`.
            if twin != entry.name and not _is_folder(entry):
                self._report("file_case", _join(path, twin), others=(entry_path,))
            if entry.is_symlink() and not os.path.realpath(entry.path).startswith(self.real_root + os.sep):
                self._report("link_outside", entry_path, f"links to {os.path.realpath(entry.path)}")
        return visible

    def files(
        self,
        entries: Sequence[os.DirEntry[str]],
        path: str,
        split: str,
        class_name: str | None,
        *,
        code: str | None = None,
    ) -> None:
        """List the images directly in a folder, and report other files. `code` is a finding to add for each image."""
        for entry in entries:
            entry_path = _join(path, entry.name)
            if _is_folder(entry):
                continue
            if _is_image(entry):
                # Only regular files are read: reading a pipe would block forever.
                if entry.is_file():
                    self.listing.images.append(ImageEntry(entry_path, split, class_name))
                else:
                    self._report(
                        "unreadable_file", entry_path, "broken link" if entry.is_symlink() else "not a regular file"
                    )
                if code is not None:
                    self._report(code, entry_path)
            elif entry.is_file():
                format_name = _format_of_file(entry.path)
                if format_name is not None:
                    self._report("ignored_image", entry_path, f"its content is {format_name}")
                elif class_name is not None:
                    self._report("other_file", entry_path)

    def _class_folder(self, path: str, split: str, class_name: str, above: set[str], visited: dict[str, str]) -> None:
        """List a class folder, or a folder in one.

        Args:
            above: the real paths of the folders that contain it.
            visited: the folders of this class read so far, by their real paths.
        """
        real = os.path.realpath(self.root / path)
        if real in above:
            self._report("link_loop", path, f"links to {real}")
            return
        if path.count("/") > MAX_DEPTH:
            self._report("unreadable_folder", path, f"nested more than {MAX_DEPTH} folders deep")
            return
        first = visited.setdefault(real, path)
        if first != path:
            self._report("repeated_folder", path, f"links to {real}", others=(first,))
            return
        entries = self.entries(path)
        self.files(entries, path, split, class_name)
        for entry in filter(_is_folder, entries):
            entry_path = _join(path, entry.name)
            before = len(self.listing.images)
            self._class_folder(entry_path, split, class_name, above | {real}, visited)
            count = len(self.listing.images) - before
            if count:
                self._report("nested_folder", entry_path, "1 image" if count == 1 else f"{count:,} images")

    def _report(self, code: str, path: str, detail: str = "", *, others: tuple[str, ...] = ()) -> None:
        self.listing.findings.append(Finding(code, path, detail, others))


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".") and not _links_to_itself(entry)]
    except OSError:
        return []


def _links_to_itself(entry: os.DirEntry[str]) -> bool:
    try:
        entry.is_dir()
    except OSError:
        return True
    return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir()


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir()


def _format_of_file(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return format_of(file.read(HEAD_BYTES))
    except OSError:
        return None


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


class SetSource:
    """The images of several sets, concatenated."""

    def __init__(self, sets: Sequence[ImageSet]) -> None:
        self.sets = sets
        self._ends = list(accumulate(len(images) for images in sets))

    def read(self, index: int, path: str) -> bytes:
        number = bisect_right(self._ends, index)
        images = self.sets[number]
        return images.read_bytes(index - self._ends[number] + len(images))


def _is_image_folder(data: Path) -> bool:
    """Whether DATA is a folder of image files, rather than a list, a folder of lists or tar files, or a set on the hub.

    Raises ValueError if there is no such folder.
    """
    if str(data).startswith(PREFIX) or data.is_file():
        return False
    if not data.is_dir():
        raise ValueError(f"{data}: no such folder; name the folder that contains the images or the splits")
    names = {name for split in _SPLITS for name in split_names(split)}
    lists = [data / f"{name}.csv" for name in names]
    shards = [*data.glob("*.tar"), *(tar for name in names for tar in data.glob(f"{name}/*.tar"))]
    return not shards and not any(path.is_file() for path in lists)


def _open_sets(data: Path) -> tuple[Listing, Source]:
    sets: dict[Path, ImageSet] = {}
    errors = []
    for split in _SPLITS:
        try:
            images = open_images(data, split=split)
        except NoSuchSplit as error:
            # A split may be missing, but those present must be valid.
            errors.append(error)
            continue
        # A split called "test" is found as "val" too.
        sets.setdefault(images.path(0), images)
    if not sets:
        raise errors[0]
    listing = Listing("lists")
    for images in sets.values():
        listing.images += [
            ImageEntry(_relative_path(images.path(index), data), images.split, images.class_names[images.label(index)])
            for index in range(len(images))
        ]
        listing.classes[images.split] = dict(Counter(images.class_names[label] for label in images.labels))
    return listing, SetSource(list(sets.values()))


def _relative_path(path: Path, data: Path) -> str:
    base = data if data.is_dir() else data.parent
    return os.path.relpath(path, base) if path.is_relative_to(base) else str(path)
