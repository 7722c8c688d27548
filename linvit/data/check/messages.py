"""What C libraries print to stderr while they decode: their only way to tell that an image came out damaged."""

import os
import tempfile
from types import TracebackType
from typing import Self


class DecoderMessages:
    """While it is entered, what the process prints to stderr, even from C, is caught instead."""

    def __enter__(self) -> Self:
        self._saved = os.dup(2)
        self._file = tempfile.TemporaryFile()
        os.dup2(self._file.fileno(), 2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)
        self._file.close()

    def take(self) -> str:
        """What was printed since it was last asked."""
        handle = self._file.fileno()
        length = os.lseek(handle, 0, os.SEEK_CUR)
        if length == 0:
            return ""
        os.lseek(handle, 0, os.SEEK_SET)
        text = os.read(handle, length)
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        return text.decode(errors="replace")
