"""Files are written completely or not at all, and read back where that is promised."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from linvit.output.files import (
    delete_folder,
    remove_leftovers,
    replace_files,
    scratch_of,
    write_file,
    write_json,
    write_text,
    write_verified,
)


def fail_when_full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_only_the_new_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    write_text(path, "new ×")
    assert path.read_text(encoding="utf-8") == "new ×"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", fail_when_full)
    with pytest.raises(OSError, match=r"cannot write .*file.txt: no space left on device; make room") as caught:
        write_text(path, "new")
    assert "--output" in str(caught.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def write_half(file: BinaryIO) -> None:
        file.write(b"ne")
        fail_when_full()

    def stop(file: BinaryIO) -> None:
        file.write(b"ne")
        raise KeyboardInterrupt

    for write, kind in ((write_half, OSError), (stop, KeyboardInterrupt)):
        with pytest.raises(kind):
            write_file(path, write)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    fsync = os.fsync

    def watched(handle: int) -> None:
        seen.append((tmp_path / "file.txt").exists())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write_text(tmp_path / "file.txt", "text")
    # Once for the file, then for the folder that holds its new name.
    assert seen == [False, True]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*nowhere/file.txt: no such file or directory"):
        write_text(tmp_path / "nowhere" / "file.txt", "text")


def test_a_folders_files_are_replaced_weights_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, folder = tmp_path / "scratch", tmp_path / "folder"
    for each, text in ((scratch, "new"), (folder, "old")):
        each.mkdir()
        for name in ("config.json", "model.safetensors"):
            (each / name).write_text(text)
    order: list[str] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        assert folder.is_dir()
        order.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    replace_files(scratch, folder)
    assert order == ["model.safetensors", "config.json"]
    assert {path.read_text() for path in folder.iterdir()} == {"new"}
    assert not scratch.exists()


def test_written_data_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The digest of these three letters is in FIPS 180-2, appendix B.1.
    assert write_verified(tmp_path / "file", b"abc").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")
    assert (tmp_path / "file").read_bytes() == b"abc"
    with pytest.raises(FileExistsError):
        write_verified(tmp_path / "file", b"abd")
    fsync = os.fsync

    def cut(handle: int) -> None:
        fsync(handle)
        os.ftruncate(handle, 2)

    monkeypatch.setattr(os, "fsync", cut)
    with pytest.raises(OSError, match="the data read back differ from the data written"):
        write_verified(tmp_path / "other", b"abc")


def test_a_folder_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("folder", ".folder.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    unlink = os.unlink

    def watched(path: Any, *args: Any, **kwargs: Any) -> None:
        seen.append((tmp_path / "folder").exists())
        unlink(path, *args, **kwargs)

    seen: list[bool] = []
    monkeypatch.setattr(os, "unlink", watched)
    delete_folder(tmp_path / "folder")
    # The remains of a deletion that was killed are removed first.
    assert seen == [True, False]
    assert list(tmp_path.iterdir()) == []


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    for name in (".a.part", "b.part", ".hidden", "c"):
        (tmp_path / name).touch()
    for name in (".d.gone", ".e.part", "f"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "b.part", "c", "f"]


def process_that_ended() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_a_process_has_its_own_temporary_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = scratch_of(tmp_path / "a.csv")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert scratch_of(tmp_path / "a.csv") != own
    assert scratch_of(tmp_path / ("é" * 127)).name != scratch_of(tmp_path / ("é" * 126)).name
    scratch_of(tmp_path / ("é" * 127)).touch()


def test_leftovers_of_a_living_process_are_kept(tmp_path: Path) -> None:
    own = scratch_of(tmp_path / "a.csv").name
    machine = own.split(".")[-2].split("-")[0]
    dead = f".a.csv.{machine}-{process_that_ended()}.part"
    kept = [own, f".a.csv.{machine}-1.part", ".a.csv.00000000-5.part", "a.csv"]
    old = ".a.csv.00000000-6.part"
    for name in (dead, ".a.csv.part", old, *kept):
        (tmp_path / name).touch()
    (tmp_path / ".b.part").mkdir()
    os.utime(tmp_path / old, (0, 0))
    # Another file's leftovers are not touched when one is written.
    assert scratch_of(tmp_path / "a.csv").name == own
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".b.part"])
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_json_has_null_for_numbers_that_are_not_finite(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    value = {"a": math.nan, "b": [1.5, -math.inf, (math.inf, "NaN")], "c": {"d": None, "e": 2}}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    read = json.loads(text, parse_constant=refuse)
    assert read == {"a": None, "b": [1.5, None, [None, "NaN"]], "c": {"d": None, "e": 2}}
