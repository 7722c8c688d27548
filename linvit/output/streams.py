"""Outputs that are not files on a disk: `-` for stdout, open descriptors such as /dev/fd/3, named pipes, devices."""

import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

_STANDARD = {"-": 1, "/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")


def is_stream(path: Path) -> bool:
    """Whether `path` is written to as it is, instead of being replaced by a new file."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def goes_to_stdout(path: Path | None) -> bool:
    """Whether `path` is a name of stdout."""
    return path is not None and _descriptor(path) == 1


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """Open a stream for writing, and flush it at the end. Raises OSError if it cannot be written."""
    descriptor = _descriptor(path)
    if descriptor == 1:
        # What was printed before comes first.
        sys.stdout.flush()
        yield cast(BinaryIO, sys.stdout.buffer)
        sys.stdout.flush()
        return
    # A descriptor is shared, not opened anew: opening /dev/fd/3 would truncate a file behind it.
    with path.open("wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb") as file:
        yield cast(BinaryIO, file)


def check_stream(path: Path) -> None:
    """Raise OSError if a descriptor is not open for writing."""
    descriptor = _descriptor(path)
    if descriptor is not None and os.name == "posix":
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError("it is open for reading only")


def _descriptor(path: Path) -> int | None:
    name = os.fspath(path)
    match = _DESCRIPTOR.fullmatch(name)
    return int(match[1]) if match else _STANDARD.get(name)
