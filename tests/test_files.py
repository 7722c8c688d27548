import errno
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from linvit.files import replace_files, write_file, write_text


def fail_when_full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_new_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    write_text(path, "new ×")
    assert path.read_text(encoding="utf-8") == "new ×"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    with pytest.raises(OSError, match="no space left"):
        write_file(path, write_half)
    assert path.read_bytes() == b"old"


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit on file sizes")
def test_torch_running_out_of_room_is_told_as_such(tmp_path: Path) -> None:
    """The system itself refuses to write on, as on a full disk; torch then fails in a way of its own."""
    import resource

    path = tmp_path / "state.pth"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*state.pth: file too large; make room"):
            write_file(path, lambda file: torch.save({"weight": torch.zeros(1_000_000)}, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
