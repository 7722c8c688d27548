"""A labelled set of images, wherever they lie: what the loader reads from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from linvit.data.read import decode_image


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
