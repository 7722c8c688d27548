"""Writing files so that a crash or a full disk leaves the old file or the new one, never half of one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have `write` fill a temporary file, flush it to the disk and rename it to `path`.

    Raises OSError, naming the file and the mend, where it cannot be written; `path` is then as it was.
    """
    scratch = path.with_name(f".{path.name}.part")
    try:
        with scratch.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        scratch.unlink(missing_ok=True)
        # torch.save ends with an error of its own after the one that the disk gave.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise cannot_write(path, cause) from error


def write_text(path: Path, text: str) -> None:
    """`write_file` for text, in UTF-8."""
    write_file(path, lambda file: file.write(text.encode()))


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
    _sync_folder(folder)
    scratch.rmdir()


def cannot_write(path: Path, error: Exception) -> OSError:
    """`error` as one sentence that names the file and the mend."""
    why = (error.strerror if isinstance(error, OSError) else None) or reason(error)
    return OSError(
        f"cannot write {path}: {why[:1].lower()}{why[1:]}; make room or choose another --output (what was "
        "written before is kept)"
    )


def reason(error: Exception) -> str:
    """An error's first line, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _sync_folder(folder: Path) -> None:
    """Make renames in `folder` last, where the system can open a folder."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
