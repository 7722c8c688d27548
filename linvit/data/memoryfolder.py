"""Folders in memory that processes share, and that do not outlive them."""

import atexit
import os
import shutil
import sys
from pathlib import Path

# Linux keeps the files below it in memory.
_MEMORY = Path("/dev/shm")
_LOCK = "lock"


def share_memory_folder(name: str) -> Path:
    """A folder in memory, the same for all processes of this user that ask for it.

    It is deleted when the last of them ends. Where that one was killed, the next call, for any name, deletes it.

    Raises:
        ValueError: where the system has no such folders.
    """
    if sys.platform != "linux" or not _MEMORY.is_dir():
        raise ValueError("cache memory needs /dev/shm, which this system lacks; set cache disk and a cache_dir")
    import fcntl

    # Named for the user: to others it is closed.
    parent = _MEMORY / f"linvit-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    for other in parent.iterdir():
        _delete_unless_used(other)
    while True:
        (parent / name).mkdir(exist_ok=True)
        try:
            handle = os.open(parent / name / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            # Another process has just deleted it.
            continue
        fcntl.flock(handle, fcntl.LOCK_SH)
        if _is_there(parent / name / _LOCK, handle):
            break
        os.close(handle)
    atexit.register(_leave, parent / name, handle)
    return parent / name


def _is_there(lock: Path, handle: int) -> bool:
    try:
        return lock.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def _delete_unless_used(folder: Path) -> None:
    try:
        handle = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        # Just made, or just deleted.
        return
    _leave(folder, handle)


def _leave(folder: Path, handle: int) -> None:
    """Deletes the folder if no other process holds its lock."""
    if sys.platform == "linux":
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            shutil.rmtree(folder, ignore_errors=True)
    os.close(handle)
