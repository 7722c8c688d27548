"""The process of a command: its exit status, its errors in one line, and its standard streams."""

import io
import os
import sys
from collections.abc import Callable

from linvit.output.files import printable, reason


class UsageError(ValueError):
    """The command line or the configuration is wrong: exit status 2 instead of 1."""

    exit_status = 2


def run(work: Callable[[], int | None]) -> int:
    """Run a command's `work` and return its exit status.

    ValueError and OSError, which the user can fix, become one line on stderr, and a line for each note that was added
    to the error; LINVIT_DEBUG=1 shows the traceback. The status is 1, or the error's `exit_status`.
    An error with `is_reported` is printed by another process.
    """
    try:
        _check_streams()
        try:
            status = work() or 0
        except SystemExit:
            _flush()
            raise
        _flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # As the shell reports a program that a closed pipe ended.
        _discard_stdout()
        return 141
    except (ValueError, OSError) as error:
        if os.environ.get("LINVIT_DEBUG") == "1":
            raise
        if getattr(error, "is_reported", False):
            return getattr(error, "exit_status", 1)
        # A full disk may be found by the work and again by the flush.
        errors = dict.fromkeys(filter(None, [str(error), _stdout_error()]))
        for line in (*(f"error: {each}" for each in errors), *getattr(error, "__notes__", [])):
            print(printable(line), file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except RuntimeError as error:
        if os.environ.get("LINVIT_DEBUG") == "1" or not str(error).startswith("DataLoader worker"):
            raise
        print(f"error: {_why_worker_died(str(error))}", file=sys.stderr)
        return 1


def _why_worker_died(message: str) -> str:
    """The likely cause and the fix, from torch's message about a worker process of a loader."""
    if "Bus error" in message:
        cause = "shared memory ran out: give the container more (docker run --shm-size 8g), or lower --workers"
    else:
        cause = "probably because memory ran out: lower --workers or --batch-size"
    return f"the system ended a process that reads images, {cause}"


def _check_streams() -> None:
    """Raise OSError if stdout is closed. A closed stdin or stderr is replaced, so that no file takes its descriptor."""
    missing = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    if missing and os.name == "posix":
        for descriptor in range(3):
            try:
                os.fstat(descriptor)
            except OSError:
                os.open(os.devnull, os.O_RDWR)
    if "stderr" in missing:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  it stays open
    if "stdout" in missing:
        raise OSError("stdout is closed; redirect it to a file or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that is not UTF-8 lacks some characters of names and tables.
        sys.stdout.reconfigure(errors="replace")


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_stdout()
        raise OSError(f"cannot write to stdout: {reason(error)}") from error


def _stdout_error() -> str | None:
    """Why stdout cannot be written, if that is so; its buffer is then discarded."""
    try:
        if sys.stdout is not None:
            _flush()
    except BrokenPipeError:
        _discard_stdout()
    except OSError as error:
        return str(error)
    return None


def _discard_stdout() -> None:
    # Otherwise the interpreter would report the error again when it flushes stdout at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
