"""Write files so that a crash or a full disk leaves either the old file or the new one, never half a file.

Files and folders have the hidden name `.NAME.HOST-PROCESS.part` while they are written, and `.NAME.gone` while they are
deleted.
"""

import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from linvit.output.streams import is_stream, open_stream

# Owner of a temporary file: a checksum of the machine's name, and the process.
_OWNER = re.compile(r"\.([0-9a-f]{8})-(\d+)\.part")
# A process on another machine, which shares the disk, is taken for dead when its file is this old.
_SECONDS_OF_OTHER_MACHINES = 24 * 3600
# Most file systems allow names of 255 bytes.
_LONGEST_NAME = 200


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a temporary file, flush the file to disk and rename it to `path`.

    A link stays, and its target is replaced. `-` (stdout), pipes and devices are written to directly.

    Raises OSError, naming the file and the fix, if it cannot be written; a file at `path` is then unchanged.
    """
    with writing(path):
        if is_stream(path):
            with open_stream(path) as file:
                write(file)
            return
        target = target_of(path)
        scratch = scratch_of(target)
        try:
            with scratch.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(target)
            sync_folder(target.parent)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def target_of(path: Path) -> Path:
    """The file that `path` names: the end of its chain of links, which need not exist."""
    return Path(os.path.realpath(path))


def check_writable(path: Path) -> None:
    """Raise OSError if `write_file` could not write `path`. A file is created beside it and deleted."""
    target = target_of(path)
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "it is write-protected")
    # A process that was killed may have had the same number, as in a restarted container, and have left the file.
    scratch = scratch_of(target)
    scratch.open("wb").close()
    scratch.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into one that names `path` and the fix; a closed pipe remains a BrokenPipeError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text (see `encode`) with `write_file`."""
    write_file(path, lambda file: file.write(encode(text)))


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write JSON with `write_file`; numbers that are not finite become null, since JSON has no NaN."""
    write_text(path, json_text(value, indent=indent))


def json_text(value: Any, *, indent: int | None = 2, ensure_ascii: bool = True) -> str:
    """`value` as strict JSON with a final line break; numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False) + "\n"


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raises ValueError, also for JSON that is nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def encode(text: str) -> bytes:
    """`text` in UTF-8, in which bytes of a path that are not UTF-8 stay as they are."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # Surrogates that stand for no byte, as a JSON file may contain.
        return text.encode("utf-8", "replace")


def valid_utf8(text: str) -> str:
    """`text` for a format that holds valid Unicode only: bytes of a path that are not UTF-8 become `�`."""
    return encode(text).decode("utf-8", "replace")


def printable(text: str) -> str:
    """`text` on one line: control characters, line breaks and bytes that are not UTF-8 become `�`."""
    # Spaces of other widths are not printable for Python, but harmless: macOS puts one into names of screenshots.
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else "�" for c in valid_utf8(text))


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
    """The temporary path at which this process writes a file or folder; deletes what killed processes left there."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    # A folder that does not exist or cannot be listed is reported by the caller, who writes in it.
    with suppress(OSError):
        _remove_dead(path.parent, re.compile(rf"\.{re.escape(name)}({_OWNER.pattern}|\.part)"))
    return path.with_name(f".{name}.{_machine()}-{os.getpid()}.part")


def remove_leftovers(folder: Path) -> None:
    """Delete the files and folders that killed processes left half written or half deleted in `folder`."""
    _remove_dead(folder, re.compile(r"\..*\.(part|gone)", re.DOTALL))


def _remove_dead(folder: Path, names: re.Pattern[str]) -> None:
    with os.scandir(folder) as entries:
        dead = [Path(entry.path) for entry in entries if names.fullmatch(entry.name) and not _is_in_use(entry)]
    for path in dead:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_in_use(entry: os.DirEntry[str]) -> bool:
    """Whether the process that writes a temporary file or folder may still be running."""
    owner = _OWNER.search(entry.name)
    if owner is None:
        return False
    machine, process = owner[1], int(owner[2])
    if machine != _machine() or os.name != "posix":
        return time.time() - entry.stat(follow_symlinks=False).st_mtime < _SECONDS_OF_OTHER_MACHINES
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode(errors='replace')):08x}"


def cannot_write(path: Path, error: OSError) -> OSError:
    """`error` as one sentence that names the file and the fix."""
    return OSError(
        f"cannot write {path}: {reason(error)}; make room or choose another --output (files written earlier are kept)"
    )


def reason(error: Exception) -> str:
    """The first line of an error's message, or the error's class if the message is empty."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
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
