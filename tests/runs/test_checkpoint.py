"""Checkpoints on disk: complete or absent, whatever happens while they are written, read or deleted."""

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import assert_same

from linvit.runs import checkpoint
from linvit.runs.checkpoint import (
    is_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    retire_later,
    verify_checkpoint,
    write_checkpoint,
)

FILES = ["ema.safetensors", "manifest.json", "model.safetensors", "training.pt"]


def state_at(epoch: int, batch: int = 0, size: int = 3) -> dict[str, Any]:
    weight = torch.full((size,), float(epoch))
    return {
        "progress": {"epoch": epoch, "batch": batch, "summary": [{"epoch": 0, "loss": 0.5}]},
        "state_dict": {"weight": weight, "planes": torch.arange(8.0).view(2, 4).t(), "shared": weight.clone()},
        "state_dict_ema": {"weight": weight / 2, "half": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"exp_avg": weight * 3, "step": torch.tensor(5.0)}}, "param_groups": [{"lr": 0.1}]},
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_checkpoint_reads_back(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state_at(3, 12))
    assert path == tmp_path / "state-0003-000012"
    assert names(path) == FILES
    assert names(tmp_path) == ["state-0003-000012"]
    assert_same(read_checkpoint(path), state_at(3, 12))
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["epoch"], manifest["batch"]) == (2, 3, 12)
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        name: (path / name).stat().st_size for name in FILES if name != "manifest.json"
    }
    # The files can be read without linvit.
    assert load_file(path / "model.safetensors")["planes"].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert torch.load(path / "training.pt", weights_only=True)["progress"]["batch"] == 12


def test_without_ema_there_is_no_ema_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state_at(1) | {"state_dict_ema": None})
    assert names(path) == [name for name in FILES if name != "ema.safetensors"]
    assert read_checkpoint(path)["state_dict_ema"] is None


def test_a_checkpoint_gets_its_name_after_all_files_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def watched_rename(self: Path, target: Path) -> Path:
        assert flushed == ["model.safetensors", "ema.safetensors", "training.pt", "manifest.json", self.name]
        assert names(self) == FILES
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    write_checkpoint(tmp_path, state_at(1))
    assert flushed[-1] == tmp_path.name


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_damage_to_any_file_is_named(name: str, how: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state_at(1))
    data = bytearray((path / name).read_bytes())
    if how == "gone":
        (path / name).unlink()
    elif how == "cut":
        (path / name).write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)
    with pytest.raises(ValueError, match="state-0001-000000 cannot be used as a training checkpoint: ") as caught:
        read_checkpoint(path)
    assert name in str(caught.value) or name == "manifest.json"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3, "format": 2}', '{"files": {"../weights": {}}, "format": 2}'])
def test_an_invalid_manifest_is_refused(text: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state_at(1))
    (path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        verify_checkpoint(path)


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    path = write_checkpoint(tmp_path, state_at(1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="its format is 3, not 2"):
        verify_checkpoint(path)


class Poison:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_no_pickle_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in torch's zip nor as a bare pickle, even if the manifest has its hash."""
    monkeypatch.chdir(tmp_path)
    for poison in (
        lambda path: torch.save({"progress": Poison()}, path),
        lambda path: path.write_bytes(pickle.dumps(Poison(), protocol=2)),
    ):
        path = write_checkpoint(tmp_path, state_at(1))
        poison(path / "training.pt")
        manifest = json.loads((path / "manifest.json").read_text())
        entry = {"bytes": (path / "training.pt").stat().st_size, "sha256": checkpoint.sha256_of(path / "training.pt")}
        manifest["files"]["training.pt"] = entry
        (path / "manifest.json").write_text(json.dumps(manifest))
        verify_checkpoint(path)
        with pytest.raises(ValueError, match="cannot be used as a training checkpoint"):
            read_checkpoint(path)
        checkpoint.delete_folder(path)
    assert not (tmp_path / "executed").exists()


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Make the system refuse to write larger files, as on a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_full_disk_leaves_only_the_old_checkpoints(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, state_at(1))
    with (
        file_size_limit(100_000),
        pytest.raises(OSError, match=r"cannot write .*state-0002-000000: file too large; make room"),
    ):
        write_checkpoint(tmp_path, state_at(2, size=100_000))
    assert names(tmp_path) == ["state-0001-000000"]
    verify_checkpoint(tmp_path / "state-0001-000000")
    write_checkpoint(tmp_path, state_at(2, size=100_000))
    assert names(tmp_path) == ["state-0001-000000", "state-0002-000000"]


def test_data_that_read_back_differently_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def rotting(handle: int) -> None:
        fsync(handle)
        if os.readlink(f"/proc/self/fd/{handle}").endswith("training.pt"):
            os.pwrite(handle, b"?", 40)

    monkeypatch.setattr(os, "fsync", rotting)
    with pytest.raises(OSError, match="the data read back differ from the data written"):
        write_checkpoint(tmp_path, state_at(1))
    assert names(tmp_path) == []


def test_a_checkpoint_of_the_same_batch_is_kept_if_intact(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state_at(1))
    inode = path.stat().st_ino
    assert write_checkpoint(tmp_path, state_at(1)).stat().st_ino == inode
    (path / "training.pt").write_bytes(b"")
    assert write_checkpoint(tmp_path, state_at(1)) == path
    verify_checkpoint(path)
    assert names(tmp_path) == ["aside-0-state-0001-000000", "state-0001-000000"]


def test_a_half_written_folder_of_a_killed_run_is_written_again(tmp_path: Path) -> None:
    (tmp_path / ".state-0001-000000.part").mkdir()
    (tmp_path / ".state-0001-000000.part/model.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    verify_checkpoint(write_checkpoint(tmp_path, state_at(1)))
    assert names(tmp_path) == ["state-0001-000000"]


def test_checkpoints_are_in_the_order_of_the_run(tmp_path: Path) -> None:
    for epoch, batch in ((2, 0), (1, 7), (1, 0), (1, 100_000), (10_000, 0)):
        write_checkpoint(tmp_path, state_at(epoch, batch))
    (tmp_path / "state-notes").touch()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "state-0001-000000",
        "state-0001-000007",
        "state-0001-100000",
        "state-0002-000000",
        "state-10000-000000",
    ]


def test_pruning_keeps_the_newest_and_milestones(tmp_path: Path) -> None:
    for epoch in range(1, 6):
        write_checkpoint(tmp_path, state_at(epoch))
    prune_checkpoints(tmp_path, keep=2, milestones=[1])
    # Epoch 1, counted from 0, ends at state-0002-000000.
    assert names(tmp_path) == ["state-0002-000000", "state-0004-000000", "state-0005-000000"]


def test_killed_pruning_leaves_no_half_deleted_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for epoch in (1, 2):
        write_checkpoint(tmp_path, state_at(epoch))

    def killed(self: Path | str, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(tmp_path, keep=1, milestones=[])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["state-0002-000000"]
    assert ".state-0001-000000.gone" in names(tmp_path)


def test_later_checkpoints_are_retired(tmp_path: Path) -> None:
    for epoch, batch in ((1, 0), (1, 4), (2, 0)):
        write_checkpoint(tmp_path, state_at(epoch, batch))
    assert [path.name for path in retire_later(tmp_path, epoch=1, batch=0)] == [
        "aside-0-state-0001-000004",
        "aside-0-state-0002-000000",
    ]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["state-0001-000000"]
    write_checkpoint(tmp_path, state_at(2))
    assert [path.name for path in retire_later(tmp_path, epoch=1, batch=0)] == ["aside-1-state-0002-000000"]


def test_folders_that_are_checkpoints(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state_at(1))
    assert is_checkpoint(path)
    assert is_checkpoint(path.rename(tmp_path / "kept"))
    (tmp_path / "state-0004-000000").mkdir()
    assert is_checkpoint(tmp_path / "state-0004-000000")
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "state-0005-000000")
