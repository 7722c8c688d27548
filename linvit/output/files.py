"""Write files so that a crash or a full disk leaves either the old file or the new one, never half a file.

Files and folders have the hidden name `.NAME.part` while they are written, and `.NAME.gone` while they are deleted.
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
    """Call `write` on a temporary file, flush the file to disk and rename it to `path`.

    Raises OSError, naming the file and the fix, if it cannot be written; `path` is then unchanged.
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
    """Write UTF-8 text with `write_file`."""
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write JSON with `write_file`; numbers that are not finite become null, since JSON has no NaN."""
    write_text(path, json_text(value, indent=indent))


def json_text(value: Any, *, indent: int | None = 2, ensure_ascii: bool = True) -> str:
    """`value` as strict JSON with a final line break; numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def valid_utf8(text: str) -> str:
    """`text` for a format that holds valid Unicode only: bytes of a path that are not UTF-8 become `�`."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def replace_files(scratch: Path, folder: Path) -> None:
    """Move the files of `scratch` over those of `folder`, each atomically, in reverse order of their names.

    A folder cannot be renamed over another one. This way `folder` always exists and contains complete files.
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
    """Write a new file, flush it to disk and read it back; returns its SHA-256 in hexadecimal.

    Raises OSError if the file exists, cannot be written, or reads back differently.
    """
    digest = hashlib.sha256(data).hexdigest()
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            # Drop the file from the page cache, so that it is read from the disk.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sha256_of(path) != digest:
        raise OSError(errno.EIO, "the data read back differ from the data written")
    return digest


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def delete_folder(folder: Path) -> None:
    """Delete a folder; it loses its name first, so that a crash never leaves half of it under that name."""
    doomed = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def scratch_of(path: Path) -> Path:
    """The temporary path at which a file or folder is written."""
    return path.with_name(f".{path.name}.part")


def remove_leftovers(folder: Path) -> None:
    """Delete the files and folders that killed processes left half written or half deleted in `folder`."""
    for pattern in _LEFTOVERS:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def cannot_write(path: Path, error: OSError) -> OSError:
    """`error` as one sentence that names the file and the fix."""
    why = error.strerror or reason(error)
    return OSError(
        f"cannot write {path}: {why[:1].lower()}{why[1:]}; make room or choose another --output (files "
        "written earlier are kept)"
    )


def reason(error: Exception) -> str:
    """The first line of an error's message, or the error's class if the message is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, so that renames in it survive a crash."""
    # Windows cannot open a folder.
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
