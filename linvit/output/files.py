"""Writing files so that a crash or a full disk leaves the old file or the new one, never half of one.

What is not whole yet, or on its way out, has a hidden name until it is: `.NAME.part` or `.NAME.gone`.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

_LEFTOVERS = (".*.part", ".*.gone")


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have `write` fill a temporary file, flush it to the disk and rename it to `path`.

    Raises OSError, naming the file and the mend, where it cannot be written; `path` is then as it was.
    """
    scratch = scratch_of(path)
    try:
        with scratch.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def write_text(path: Path, text: str) -> None:
    """`write_file` for text, in UTF-8."""
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """`write_file` for JSON; a number that is not finite becomes null, since JSON has no NaN."""
    write_text(path, json_text(value, indent=indent))


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """`value` as strict JSON and a line break; a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def replace_files(scratch: Path, folder: Path) -> None:
    """Move the files of `scratch` over those of `folder`, each whole, in the order of their names from the last.

    A folder cannot be renamed over another; this way `folder` is never absent and holds whole files throughout.
    """
    files = sorted(scratch.iterdir(), reverse=True)
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    folder.mkdir(exist_ok=True)
    for file in files:
        file.replace(folder / file.name)
    sync_folder(folder)
    scratch.rmdir()


def write_verified(path: Path, data: bytes | memoryview) -> str:
    """Write a new file, flush it to the disk and read it back; returns its SHA-256 in hexadecimal.

    Raises OSError where it cannot be written, or where other bytes come back.
    """
    digest = hashlib.sha256(data).hexdigest()
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            # Forget what is cached, so that it is the disk that is read.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sha256_of(path) != digest:
        raise OSError(errno.EIO, "what was read back is not what was written")
    return digest


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def delete_folder(folder: Path) -> None:
    """Delete a folder so that a crash on the way leaves nothing under its name."""
    doomed = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def scratch_of(path: Path) -> Path:
    """Where a file or folder is written until it is whole."""
    return path.with_name(f".{path.name}.part")


def remove_leftovers(folder: Path) -> None:
    """Delete what processes that were killed have left half written, or half deleted, in `folder`."""
    for pattern in _LEFTOVERS:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def cannot_write(path: Path, error: OSError) -> OSError:
    """`error` as one sentence that names the file and the mend."""
    why = error.strerror or reason(error)
    return OSError(
        f"cannot write {path}: {why[:1].lower()}{why[1:]}; make room or choose another --output (what was "
        "written before is kept)"
    )


def reason(error: Exception) -> str:
    """An error's first line, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last, where the system can open a folder."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
