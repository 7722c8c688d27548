"""Images in tars: WebDataset shards, tars of class folders, a tar per class; read in any order."""

import os
import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from linvit.data.decode import EXTENSIONS, UnreadableImage
from linvit.data.sources.base import ImageSet
from linvit.data.sources.classes import MissingClasses, number_labels
from linvit.data.sources.tarindex import ShardIndex, index_shards

# Shards that a process keeps open, well below the usual limit of 1,024 files.
_MOST_OPEN = 256


class ImageShards(ImageSet):
    """The images of one split in tars, in the order of these.

    Args:
        root: folder of the tars.
        split: the split's name.
        shards: the tars, relative to `root`.
        index: the images in them.
        class_names: name of every label.
        labels: label of every image.
        note: see `ImageSet`.
    """

    def __init__(
        self,
        root: Path,
        *,
        split: str,
        shards: Sequence[str],
        index: ShardIndex,
        class_names: Sequence[str],
        labels: np.ndarray,
        note: str = "",
    ) -> None:
        super().__init__(root, split=split, class_names=class_names, labels=labels, note=note)
        self._shards = list(shards)
        self._index = index

    def path(self, index: int) -> Path:
        """The image's shard and, as if that were a folder, its name in it."""
        return self._shard(index) / self._index.names[index]

    def read_bytes(self, index: int) -> bytes:
        size = int(self._index.sizes[index])
        try:
            file = _open(self._shard(index), os.getpid(), threading.get_ident()).file
            file.seek(int(self._index.offsets[index]))
            data = file.read(size)
        except OSError as error:
            raise UnreadableImage(f"{self.path(index)}: cannot be read ({error.strerror}); restore the tar") from error
        if len(data) < size:
            raise UnreadableImage(f"{self.path(index)}: the tar has become shorter; restore it")
        return data

    def _shard(self, index: int) -> Path:
        return self.root / self._shards[self._index.shards[index]]


class _OpenFile:
    """A file that is closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("rb")

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


@lru_cache(maxsize=_MOST_OPEN)
def _open(path: Path, process: int, thread: int) -> _OpenFile:
    """An open file for each process, since forked ones would share its position, and for each thread."""
    return _OpenFile(path)


def open_shards(
    paths: Sequence[Path],
    *,
    split: str,
    class_file: Path,
    class_names: Sequence[str] | None = None,
    missing_classes: MissingClasses = "refuse",
) -> ImageShards:
    """Finds the images and labels in tars, which lie in one folder.

    An image's label is in the file NAME.cls or, under "label", NAME.json beside it in the tar; else it is the name of
    the folder that it lies in there; else in NAME.txt; else the tar is that of a class, by its name, unless that ends
    in a number. Labels may be whole numbers: see `number_labels`.

    Raises:
        ValueError: for tars without images, an image without a label, and as `scan_tar` and `number_labels` do.
    """
    root = paths[0].parent
    index = index_shards(paths)
    if not len(index.names):
        raise ValueError(f"{root}: no images in {len(paths)} tars of '{split}' (looked for {' '.join(EXTENSIONS)})")
    labels, codes = _labelled(paths, index, split)
    classes = number_labels(
        labels, source=root, class_names=class_names, missing_classes=missing_classes, class_file=class_file
    )
    return ImageShards(
        root,
        split=split,
        shards=[path.name for path in paths],
        index=index,
        class_names=classes.names,
        labels=np.array([classes.label_of[label] for label in labels])[codes],
        note=classes.note,
    )


def _labelled(paths: Sequence[Path], index: ShardIndex, split: str) -> tuple[list[str], np.ndarray]:
    """The labels, each once, and the place of every image's; those of the tars' names where no image has its own."""
    unlabelled = np.flatnonzero(index.codes < 0)
    if not len(unlabelled):
        return index.labels, index.codes
    stems = [path.stem for path in paths]
    for image in unlabelled[np.unique(index.shards[unlabelled], return_index=True)[1]].tolist():
        shard = index.shards[image]
        if index.labels or stems[shard] == split or re.search(r"[-_.]\d+$", stems[shard]):
            raise ValueError(
                f"{paths[shard] / index.names[image]}: has no label; put a file of its name with .cls (or .json) "
                "beside it, or the image into a folder of its class's name"
            )
    places, codes = np.unique(index.shards, return_inverse=True)
    return [stems[shard] for shard in places.tolist()], codes
