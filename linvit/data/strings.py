"""Many strings in little memory."""

import os
from collections.abc import Iterable, Iterator

import numpy as np


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
