"""Outputs of a command: checked before the work, and errors and streams that end it in one line."""

import os
import sys
from pathlib import Path

import pytest

from linvit.output.files import scratch_of
from linvit.output.terminal import page, print_line, show_line
from linvit.settings.flags import UsageError, check_files, check_folder
from linvit.settings.process import run


def fail(error: Exception) -> int:
    raise error


def show_help() -> int:
    print("usage")
    raise SystemExit(0)


def test_an_error_is_one_line_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: fail(ValueError("a\x1b[2J\nerror: b\udcff"))) == 1
    assert capsys.readouterr().err == "error: a�[2J�error: b�\n"


def test_notes_of_an_error_are_further_lines(capsys: pytest.CaptureFixture[str]) -> None:
    error = UsageError("a")
    error.add_note("b\x1b")
    error.add_note("c")
    assert run(lambda: fail(error)) == 2
    assert capsys.readouterr().err == "error: a\nb�\nc\n"


def test_a_closed_stdout_is_an_error_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert run(lambda: pytest.fail("worked")) == 1
    assert capsys.readouterr().err == "error: stdout is closed; redirect it to a file or to /dev/null\n"


def test_closed_descriptors_are_not_taken_by_files_and_messages_vanish() -> None:
    # The descriptors of a process of its own.
    child = os.fork()
    if child == 0:
        sys.stdin = sys.stderr = None  # type: ignore[assignment]
        os.close(0)
        os.close(2)
        status = run(lambda: os.open(os.devnull, os.O_RDONLY) > 2 and fail(ValueError("x")) and 0)
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_full_stdout_is_one_line_and_a_closed_pipe_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # rich and print_line flush what they print; print and argparse do not.
    for work in (lambda: print("x"), lambda: show_line(page(), "x"), lambda: print_line("x"), show_help):
        with open("/dev/full", "w", encoding="utf-8") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert run(work) == 1
        assert capsys.readouterr().err == "error: cannot write to stdout: no space left on device\n"
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w", encoding="utf-8") as closed:
            monkeypatch.setattr(sys, "stdout", closed)
            assert run(work) == 141
        assert capsys.readouterr().err == ""
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(lambda: print("x") or fail(UsageError("wrong"))) == 2  # type: ignore[func-returns-value]
    assert capsys.readouterr().err == "error: wrong\nerror: cannot write to stdout: no space left on device\n"


def test_a_file_is_refused_before_the_work_if_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protected = tmp_path / "protected.json"
    protected.write_text("old")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != protected and access(path, mode))
    (tmp_path / "nowhere.json").symlink_to(tmp_path / "gone" / "a.json")
    descriptor = os.open(os.devnull, os.O_RDONLY)
    for path, words in (
        (protected, "cannot be written: it is write-protected; choose another file"),
        (tmp_path / "gone" / "a.json", f"folder {tmp_path / 'gone'} does not exist"),
        (tmp_path / "nowhere.json", f"folder {tmp_path / 'gone'} does not exist"),
        (tmp_path, "is a folder; give a file name"),
        (Path("/proc/a.json"), "cannot be written: "),
        (tmp_path / ("x" * 300), "cannot be written: file name too long"),
        (Path("/dev/fd/999"), "cannot be written: bad file descriptor"),
        (Path(f"/dev/fd/{descriptor}"), "cannot be written: it is open for reading only"),
    ):
        with pytest.raises(UsageError) as refused:
            check_files(("--json", path))
        assert words in str(refused.value)
        assert str(refused.value).startswith(f"--json {path}")
    os.close(descriptor)
    assert protected.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["nowhere.json", "protected.json"]


def test_two_outputs_are_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("a")
    for other in ("a", "./a", "link", tmp_path / "a", "../" + tmp_path.name + "/a"):
        with pytest.raises(UsageError, match="--json and --csv are both"):
            check_files(("--json", Path("a")), ("--csv", Path(other)))
    with pytest.raises(UsageError, match="--json and --csv are both"):
        check_files(("--json", Path("-")), ("--csv", Path("/dev/stdout")))
    check_files(("--json", Path("a")), ("--csv", Path("b")), ("--plot", None))
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_an_output_does_not_replace_an_input(tmp_path: Path) -> None:
    data, listed = tmp_path / "data", tmp_path / "list.csv"
    data.mkdir()
    for path in (listed, data / "a.png"):
        path.write_text("x")
    (tmp_path / "link").symlink_to(data)
    for path in (listed, data / "a.png", tmp_path / "link" / "a.png"):
        with pytest.raises(UsageError, match="would replace a file that is read"):
            check_files(("--plot", path), inputs=[str(listed), tmp_path / "link", "hf:name"])
    (data / "check.json").touch()
    check_files(("--plot", data / "new.png"), ("--json", data / "check.json"), inputs=[listed, data])


def test_leftovers_of_a_killed_process_of_the_same_number_do_not_matter(tmp_path: Path) -> None:
    """A process in a container that is restarted often has the number of the one before."""
    scratch_of(tmp_path / "a.json").touch()
    check_files(("--json", tmp_path / "a.json"))
    scratch_of(tmp_path / "run").mkdir()
    (scratch_of(tmp_path / "run") / "model.safetensors").touch()
    check_folder("--output", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_refused_before_the_work_if_it_cannot_be_created(tmp_path: Path) -> None:
    check_folder("--output", tmp_path / "a" / "b")
    check_folder("--output", tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for path in (Path("/proc/a/b"), tmp_path / "file" / "b"):
        with pytest.raises(UsageError, match=r"--output .* cannot be created: "):
            check_folder("--output", path)
