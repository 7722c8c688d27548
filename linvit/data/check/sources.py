"""Where the images to check come from: the files of a folder, or the sets that lists, tars and the hub give."""

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from linvit.data.check.reading import FolderSource, Source
from linvit.data.check.tree import ImageEntry, Listing, scan
from linvit.data.hubset import PREFIX
from linvit.data.imageset import ImageSet
from linvit.data.sources import open_images
from linvit.data.splits import NoSuchSplit, split_names

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
