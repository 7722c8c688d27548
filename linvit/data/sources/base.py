"""Many strings in little memory.

The names under which a split is looked for.

A labelled set of images, wherever they lie: what the loader reads from.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from linvit.data.decode import decode_image


class PackedStrings:
    """A fixed list of strings as one block of bytes: millions cost little, also to copy to worker processes.

    Args:
        block: the strings, one behind the other, as the system encodes paths.
        ends: where each of them ends, int64.
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

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


_TRAIN_NAMES = ("train", "training")
_VALIDATION_NAMES = ("val", "validation", "valid", "test")


class NoSuchSplit(ValueError):
    """Data without the split that is asked for; its message names those that there are."""


def split_names(split: str) -> tuple[str, ...]:
    """The name asked for, then those that mean the same: "train" and "training"; "val", "validation" and so on."""
    if split == "train":
        return _TRAIN_NAMES
    if split in ("val", "validation"):
        return (split, *(name for name in _VALIDATION_NAMES if name != split))
    return (split,)


class ImageSet(Dataset[tuple[np.ndarray, int]], ABC):
    """Images of one split in a fixed order, any of which can be read at any time.

    Made once and copied to every worker process, so that what it holds should be small, whatever the number of images.

    Args:
        root: folder or file that the images lie in, for messages.
        split: the split's name.
        class_names: name of every label.
        labels: label of every image.
        note: what a user should be told about the labels; mostly nothing.
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
        """Where an image lies, for messages and lists; not always a file of its own."""

    @abstractmethod
    def read_bytes(self, index: int) -> bytes:
        """The image's file as it is; UnreadableImage, naming it, where it cannot be read."""

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """The image, (H, W, 3) uint8 RGB, and its label."""
        return self.read(index), self.label(index)

    def read(self, index: int) -> np.ndarray:
        """The image, (H, W, 3) uint8 RGB; UnreadableImage, naming it, where it cannot be read."""
        return decode_image(self.read_bytes(index), name=self.path(index))

    def label(self, index: int) -> int:
        return int(self._labels[index])

    @property
    def paths(self) -> list[Path]:
        return [self.path(index) for index in range(len(self))]

    @property
    def labels(self) -> list[int]:
        labels: list[int] = self._labels.tolist()
        return labels
