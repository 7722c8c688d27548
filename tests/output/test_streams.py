"""Results go to stdout, through links, and into pipes and open descriptors."""

import json
import os
import threading
from pathlib import Path

import pytest

from linvit.output.files import write_json, write_text
from linvit.output.streams import goes_to_stdout, is_stream


def test_what_is_a_stream(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("-", "/dev/stdout", "/dev/stderr", "/dev/fd/3", "/proc/self/fd/7", "/dev/null"):
        assert is_stream(Path(name))
    assert is_stream(tmp_path / "pipe")
    assert is_stream(tmp_path / "link")
    for name in ("a.json", "./-", ".", "x" * 300):
        assert not is_stream(tmp_path / name)
    assert [goes_to_stdout(path) for path in (Path("-"), Path("/dev/fd/1"), Path("/dev/fd/2"), Path("a"), None)] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_json_on_stdout_comes_after_what_was_printed(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    write_json(Path("-"), {"a": 1}, indent=None)
    print("after")
    assert capfd.readouterr().out == 'before\n{"a": 1}\nafter\n'


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_json(tmp_path / "pipe", [1, 2])
    reader.join(timeout=5)
    assert json.loads(read[0]) == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_an_open_descriptor_is_written_to_and_stays_open(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.write(b"first, ")
        file.flush()
        write_text(Path(f"/dev/fd/{file.fileno()}"), "second")
        file.write(b", third")
    assert (tmp_path / "a.txt").read_text() == "first, second, third"


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "link.json").symlink_to("results/a.json")
    (tmp_path / "chain.json").symlink_to("link.json")
    for text in ("new", "newer"):
        write_text(tmp_path / "chain.json", text)
        assert (tmp_path / "results" / "a.json").read_text() == text
    assert (tmp_path / "chain.json").is_symlink()
    assert (tmp_path / "link.json").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chain.json", "link.json", "results"]


def test_a_closed_pipe_is_no_full_disk(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        write_text(Path(f"/dev/fd/{writer}"), "x")
    os.close(writer)
