"""Shared by all image sources: the interface `ImageSet`, the names of splits, and compact lists of strings."""

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from linvit.data.decode import InputRange, decode_image

_TRAIN_NAMES = ("train", "training")
_VALIDATION_NAMES = ("val", "validation", "valid", "test")


class ImageSet(ABC):
    """Labelled images of one split in a fixed order, each of which can be read at any time.

    A set is created once and copied to every worker process, so it should stay small however many images there are.

    Args:
        root: folder or file that contains the images, for messages.
        split: name of the split.
        class_names: class name of every label.
        labels: label of every image.
        note: a remark about the labels to show the user; usually empty.
    """

    def __init__(
        self,
        root: Path,
        *,
        split: str,
        class_names: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        note: str = "",
    ) -> None:
        self.root = root
        self.split = split
        self.class_names = list(class_names)
        self.note = note
        self._labels = np.asarray(labels, dtype=np.int64)

    @abstractmethod
    def path(self, index: int) -> Path:
        """The image's path, for messages and lists; not always a separate file."""

    @abstractmethod
    def read_bytes(self, index: int) -> bytes:
        """The encoded image. Raises UnreadableImage, naming the image, if it cannot be read."""

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """The image, (H, W, 3) uint8 RGB, and its label."""
        return self.read(index), self.label(index)

    def read(self, index: int, *, input_range: InputRange | None = None) -> np.ndarray:
        """The image, (H, W, 3) uint8 RGB; see `decode_image`.

        Raises UnreadableImage, naming the image, if it cannot be read.
        """
        return decode_image(self.read_bytes(index), name=self.path(index), input_range=input_range)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def num_bytes(self, index: int) -> int:
        """Size of the encoded image. Raises UnreadableImage if it cannot be read."""
        return len(self.read_bytes(index))

    def relative_names(self) -> Iterator[bytes]:
        """The path of each image relative to the root, as the system encodes it; independent of where the data are."""
        for index in range(len(self)):
            yield os.fsencode(os.path.relpath(self.path(index), self.root))

    def renumber(self, class_names: Sequence[str]) -> None:
        """Number the labels by the position of their classes in `class_names`, the same names in another order."""
        assert sorted(class_names) == sorted(self.class_names)
        position = {name: label for label, name in enumerate(class_names)}
        self._labels = np.array([position[name] for name in self.class_names], dtype=np.int64)[self._labels]
        self.class_names = list(class_names)

    @property
    def paths(self) -> list[Path]:
        return [self.path(index) for index in range(len(self))]

    @property
    def labels(self) -> list[int]:
        labels: list[int] = self._labels.tolist()
        return labels


class ImageSubset(ImageSet):
    """Some of the images of a set, with their labels.

    Args:
        images: the set.
        indices: the images to keep, (N,), in ascending order.
        split: name of the subset.
    """

    def __init__(self, images: ImageSet, indices: np.ndarray, *, split: str) -> None:
        labels = np.asarray(images.labels, dtype=np.int64)[indices]
        super().__init__(images.root, split=split, class_names=images.class_names, labels=labels, note=images.note)
        self._images, self._indices = images, indices

    def path(self, index: int) -> Path:
        return self._images.path(int(self._indices[index]))

    def read_bytes(self, index: int) -> bytes:
        return self._images.read_bytes(int(self._indices[index]))

    def num_bytes(self, index: int) -> int:
        return self._images.num_bytes(int(self._indices[index]))

    def relative_names(self) -> Iterator[bytes]:
        is_chosen = np.zeros(len(self._images), dtype=bool)
        is_chosen[self._indices] = True
        return itertools.compress(self._images.relative_names(), is_chosen)


class NoSuchSplit(ValueError):
    """The data does not have the requested split; the message lists the splits that it has."""


def split_names(split: str) -> tuple[str, ...]:
    """The requested name, then its synonyms: "train" and "training"; "val", "validation", "valid" and "test"."""
    if split == "train":
        return _TRAIN_NAMES
    if split in ("val", "validation"):
        return (split, *(name for name in _VALIDATION_NAMES if name != split))
    return (split,)


def split_note(source: str | os.PathLike[str], requested: str, found: str) -> str:
    """A remark for the user if the test split stands in for validation images; empty otherwise."""
    if found != "test" or requested == "test":
        return ""
    return f"{source}: no validation split; 'test' is used in its place"


def join_notes(*notes: str) -> str:
    """The notes that are not empty, as one."""
    return "; ".join(filter(None, notes))


class PackedStrings:
    """A fixed list of strings in one block of bytes, so millions take little memory and copy fast to worker processes.

    Args:
        block: the concatenated strings, encoded as the system encodes paths.
        ends: end offset of each string in the block, int64.
    """

    def __init__(self, block: bytes, ends: np.ndarray) -> None:
        self.block = block
        self.ends = ends

    @classmethod
    def pack(cls, strings: Iterable[str]) -> "PackedStrings":
        encoded = [os.fsencode(string) for string in strings]
        return cls(b"".join(encoded), np.cumsum([len(part) for part in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index > 0 else 0
        return os.fsdecode(self.block[start : self.ends[index]])

    def encoded(self) -> Iterator[bytes]:
        """The strings as the system encodes paths."""
        start = 0
        for end in self.ends.tolist():
            yield self.block[start:end]
            start = end

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))
