"""Images in tars: WebDataset shards, tars of class folders or one tar per class, read in any order."""

import os
import re
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from linvit.data.decode import EXTENSIONS, MAX_FILE_BYTES, UnreadableImage
from linvit.data.sources.base import ImageSet
from linvit.data.sources.classes import MissingClasses, number_labels
from linvit.data.sources.tarindex import FIRST_DOT, ShardIndex, index_shards

# Tars that a process keeps open, well below the usual limit of 1,024 files.
_MAX_OPEN = 256


class ImageShards(ImageSet):
    """The images of one split in tars, in the order of the tars.

    Args:
        root: folder of the tars.
        split: name of the split.
        shards: the tars, relative to `root`.
        index: where the images are in the tars.
        class_names: class name of every label.
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
        """The path of the tar followed by the name of the image in it."""
        return self._shard(index) / self._index.names[index]

    def read_bytes(self, index: int) -> bytes:
        size = int(self._index.sizes[index])
        if size > MAX_FILE_BYTES:
            raise UnreadableImage(
                f"{self.path(index)}: has {size:,} bytes, more than OpenCV decodes (2 GiB); remove it"
            )
        try:
            file = _open(self._shard(index), os.getpid(), threading.get_ident()).file
            file.seek(int(self._index.offsets[index]))
            data = file.read(size)
        except OSError as error:
            raise UnreadableImage(f"{self.path(index)}: cannot be read ({error.strerror}); restore the tar") from error
        except MemoryError:
            raise UnreadableImage(f"{self.path(index)}: has {size:,} bytes, which do not fit in memory") from None
        if len(data) < size:
            raise UnreadableImage(f"{self.path(index)}: the tar is now shorter than when it was indexed; restore it")
        return data

    def num_bytes(self, index: int) -> int:
        return int(self._index.sizes[index])

    def relative_names(self) -> Iterator[bytes]:
        shards = [os.fsencode(name) for name in self._shards]
        for shard, name in zip(self._index.shards.tolist(), self._index.names.encoded()):
            yield shards[shard] + b"/" + name

    def _shard(self, index: int) -> Path:
        return self.root / self._shards[self._index.shards[index]]


def open_shards(
    paths: Sequence[Path],
    *,
    split: str,
    class_file: Path,
    class_names: Sequence[str] | None = None,
    missing_classes: MissingClasses = "refuse",
) -> ImageShards:
    """Find the images and labels of a split in tars.

    The label of an image is the first of these that exists: the text in NAME.cls beside it in the tar; the field
    "label" of NAME.json beside it; the name of its folder in the tar; the text in NAME.txt beside it. If no image has
    one, the name of each tar is the label of its images, unless it is the name of the split or ends in a number. Labels
    may be whole numbers: see `number_labels`.

    Args:
        paths: the tars, all in one folder.
        split: name of the split.
        class_file: see `number_labels`.
        class_names: class names of a run or another split, in label order; the split must not have others.
        missing_classes: whether the split may lack classes of `class_names`.

    Raises:
        ValueError: for tars without images, an image without a label, and as `scan_tar` and `number_labels` do.
    """
    root = paths[0].parent
    index = index_shards(paths)
    if not len(index.names):
        raise ValueError(f"{root}: no images in the {len(paths)} tars of '{split}' (looked for {' '.join(EXTENSIONS)})")
    labels, codes = _find_labels(paths, index, split)
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


class _OpenFile:
    """A file that is closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("rb")

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


@lru_cache(maxsize=_MAX_OPEN)
def _open(path: Path, process: int, thread: int) -> _OpenFile:
    """One open file per process and thread, since these would otherwise share its position."""
    return _OpenFile(path)


def _find_labels(paths: Sequence[Path], index: ShardIndex, split: str) -> tuple[list[str], np.ndarray]:
    """The distinct labels, and the index of each image's label among them."""
    unlabelled = np.flatnonzero(index.codes < 0)
    if not len(unlabelled):
        return index.labels, index.codes
    stems = [path.stem for path in paths]
    # The first unlabelled image of each tar.
    for image in unlabelled[np.unique(index.shards[unlabelled], return_index=True)[1]].tolist():
        shard = index.shards[image]
        if index.labels or stems[shard] == split or re.search(r"[-_.]\d+$", stems[shard]):
            name = index.names[image]
            dots = f" ({FIRST_DOT}: here after {_key(name)!r})" if _key(name) != name.rpartition(".")[0] else ""
            raise ValueError(
                f"{paths[shard] / name}: has no label; add a file of the same name{dots} with the extension .cls or "
                ".json beside it, or move the image into a folder named after its class"
            )
    shards, codes = np.unique(index.shards, return_inverse=True)
    return [stems[shard] for shard in shards.tolist()], codes


def _key(name: str) -> str:
    """The name of a WebDataset sample: the folder and the file's name up to its first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
