"""The folders and files below DATA: splits, classes and images as training sees them, and what it does not see.

Where the images to check come from: the files of a folder, or the sets that lists, tars and the hub give.
"""

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

from linvit.check.faults import Finding
from linvit.check.inspect import HEAD_BYTES, format_of
from linvit.check.run import FolderSource, Source
from linvit.data.decode import EXTENSIONS
from linvit.data.sources.base import ImageSet, NoSuchSplit, split_names
from linvit.data.sources.hub import PREFIX
from linvit.data.sources.open import open_images

Layout = Literal["splits", "classes", "images", "lists"]

_SPLIT_NAMES = {*split_names("train"), *split_names("val")}


class ImageEntry(NamedTuple):
    """An image: its path relative to DATA, its split ("" where there is none) and class (None where it has none)."""

    path: str
    split: str
    class_name: str | None


@dataclass
class Listing:
    """What DATA holds. `classes` counts images per split and class; a split without classes has an empty dict."""

    layout: Layout
    images: list[ImageEntry] = field(default_factory=list)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def scan(root: Path) -> Listing:
    """List every file below a folder; links are followed, as training follows them, but not in circles.

    Raises ValueError where it holds no images.
    """
    walk = _Walk(root, Listing(_recognise(root)))
    listing = walk.listing
    if listing.layout == "splits":
        entries = walk.entries("")
        walk.files(entries, "", "", None, code="loose_image")
        for entry in filter(_is_folder, entries):
            walk.split(entry.name, entry.name)
    else:
        walk.split("", "")
    if not listing.images:
        raise ValueError(f"{root}: holds no images (looked for {' '.join(EXTENSIONS)})")
    return listing


def _recognise(root: Path) -> Layout:
    folders = [entry for entry in _visible(root) if _is_folder(entry)]
    if not folders:
        return "images"
    inside = {folder.name: _visible(folder.path) for folder in folders}
    has_folders = {name for name, entries in inside.items() if any(map(_is_folder, entries))}
    has_images = {name for name, entries in inside.items() if any(map(_is_image, entries))}
    # Classes may be called "valid" or "test", so that a name alone does not make a split.
    if has_folders & _SPLIT_NAMES or inside.keys() <= _SPLIT_NAMES:
        return "splits"
    return "splits" if has_folders and not has_images else "classes"


class _Walk:
    def __init__(self, root: Path, listing: Listing) -> None:
        self.root = root
        self.real_root = os.path.realpath(root)
        self.listing = listing

    def split(self, path: str, split: str) -> None:
        """A folder of class folders, or of images alone."""
        entries = self.entries(path)
        counts = self.listing.classes[split] = {}
        for entry in filter(_is_folder, entries):
            before = len(self.listing.images)
            self._class_folder(_join(path, entry.name), split, entry.name, {os.path.realpath(self.root / path)})
            counts[entry.name] = len(self.listing.images) - before
        self.files(entries, path, split, None, code="loose_image" if counts else None)

    def entries(self, path: str) -> list[os.DirEntry[str]]:
        """The visible entries of a folder, sorted by name; what is odd about entries and names is noted."""
        try:
            with os.scandir(self.root / path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._note("unreadable_folder", path or ".", (error.strerror or "").lower())
            return []
        visible = []
        first: dict[str, str] = {}
        for entry in found:
            below = _join(path, entry.name)
            if entry.name.startswith("."):
                self._note("hidden", below)
                continue
            if _leads_to_itself(entry):
                self._note("link_loop", below, "leads to itself")
                continue
            visible.append(entry)
            twin = first.setdefault(entry.name.lower(), entry.name)
            # Names of classes are compared over all splits, elsewhere.
            if twin != entry.name and not _is_folder(entry):
                self._note("file_case", _join(path, twin), others=(below,))
            if entry.is_symlink() and not os.path.realpath(entry.path).startswith(self.real_root + os.sep):
                self._note("link_outside", below, f"leads to {os.path.realpath(entry.path)}")
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
        """List the images right in a folder, each also as a finding `code`, and note other files."""
        for entry in entries:
            below = _join(path, entry.name)
            if _is_folder(entry):
                continue
            if _is_image(entry):
                # Read last of all: a pipe would keep its reader waiting for ever.
                if entry.is_file():
                    self.listing.images.append(ImageEntry(below, split, class_name))
                else:
                    self._note("unreadable_file", below, "leads nowhere" if entry.is_symlink() else "is no plain file")
                if code is not None:
                    self._note(code, below)
            elif entry.is_file():
                format_name = _format_inside(entry.path)
                if format_name is not None:
                    self._note("ignored_image", below, f"{format_name}, by its content")
                elif class_name is not None:
                    self._note("other_file", below)

    def _class_folder(self, path: str, split: str, class_name: str, above: set[str]) -> None:
        real = os.path.realpath(self.root / path)
        if real in above:
            self._note("link_loop", path, f"leads to {real}")
            return
        entries = self.entries(path)
        self.files(entries, path, split, class_name)
        for entry in filter(_is_folder, entries):
            below = _join(path, entry.name)
            before = len(self.listing.images)
            self._class_folder(below, split, class_name, above | {real})
            count = len(self.listing.images) - before
            if count:
                self._note("nested_folder", below, "1 image" if count == 1 else f"{count:,} images")

    def _note(self, code: str, path: str, detail: str = "", *, others: tuple[str, ...] = ()) -> None:
        self.listing.findings.append(Finding(code, path, detail, others))


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".") and not _leads_to_itself(entry)]
    except OSError:
        return []


def _leads_to_itself(entry: os.DirEntry[str]) -> bool:
    try:
        entry.is_dir()
    except OSError:
        return True
    return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir()


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir()


def _format_inside(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return format_of(file.read(HEAD_BYTES))
    except OSError:
        return None


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


_SPLITS = ("train", "val", "test")


class SetSource:
    """The images of several sets, one after the other."""

    def __init__(self, sets: Sequence[ImageSet]) -> None:
        self.sets = sets
        self._ends = list(accumulate(len(images) for images in sets))

    def read(self, index: int, path: str) -> bytes:
        place = bisect_right(self._ends, index)
        images = self.sets[place]
        return images.read_bytes(index - self._ends[place] + len(images))


def open_source(data: Path) -> tuple[Listing, Source]:
    """List the images of DATA; raises ValueError where there are none, or a list or tar is not as it should be."""
    if _holds_folders(data):
        return scan(data), FolderSource(data)
    return _open_sets(data)


def _holds_folders(data: Path) -> bool:
    if str(data).startswith(PREFIX) or data.is_file():
        return False
    if not data.is_dir():
        raise ValueError(f"{data}: no such folder; give the folder that holds the images, or the splits")
    names = {name for split in _SPLITS for name in split_names(split)}
    lists = [data / f"{name}.csv" for name in names]
    shards = [*data.glob("*.tar"), *(tar for name in names for tar in data.glob(f"{name}/*.tar"))]
    return not shards and not any(path.is_file() for path in lists)


def _open_sets(data: Path) -> tuple[Listing, Source]:
    sets: dict[Path, ImageSet] = {}
    problems = []
    for split in _SPLITS:
        try:
            images = open_images(data, split=split)
        except NoSuchSplit as error:
            # Not every split need be there, but what is there must be sound.
            problems.append(error)
            continue
        # "val" finds what is called "test" as well.
        sets.setdefault(images.path(0), images)
    if not sets:
        raise problems[0]
    listing = Listing("lists")
    for images in sets.values():
        listing.images += [
            ImageEntry(_shown(images.path(index), data), images.split, images.class_names[images.label(index)])
            for index in range(len(images))
        ]
        listing.classes[images.split] = dict(Counter(images.class_names[label] for label in images.labels))
    return listing, SetSource(list(sets.values()))


def _shown(path: Path, data: Path) -> str:
    base = data if data.is_dir() else data.parent
    return os.path.relpath(path, base) if path.is_relative_to(base) else str(path)
