"""Checkpoints on disk: whole or not there, whatever happens while they are written, read or deleted."""

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

from linvit import checkpoint
from linvit.runs.checkpoint import (
    is_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    set_aside_later,
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


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
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
    # For others than linvit, too.
    assert load_file(path / "model.safetensors")["planes"].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert torch.load(path / "training.pt", weights_only=True)["progress"]["batch"] == 12


def test_without_an_average_there_is_no_file_of_it(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state_at(1) | {"state_dict_ema": None})
    assert names(path) == [name for name in FILES if name != "ema.safetensors"]
    assert read_checkpoint(path)["state_dict_ema"] is None


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(
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
def test_damage_to_any_file_is_found_and_named(name: str, how: str, tmp_path: Path) -> None:
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
def test_a_manifest_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
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
    """Neither torch's zip nor a bare pickle, even where the manifest vouches for it."""
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
    """The system itself refuses to write more, as on a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_no_room_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
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


def test_a_disk_that_gives_back_something_else_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def rotting(handle: int) -> None:
        fsync(handle)
        if os.readlink(f"/proc/self/fd/{handle}").endswith("training.pt"):
            os.pwrite(handle, b"?", 40)

    monkeypatch.setattr(os, "fsync", rotting)
    with pytest.raises(OSError, match="what was read back is not what was written"):
        write_checkpoint(tmp_path, state_at(1))
    assert names(tmp_path) == []


def test_one_of_the_same_point_is_kept_if_it_is_whole(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state_at(1))
    inode = path.stat().st_ino
    assert write_checkpoint(tmp_path, state_at(1)).stat().st_ino == inode
    (path / "training.pt").write_bytes(b"")
    assert write_checkpoint(tmp_path, state_at(1)) == path
    verify_checkpoint(path)
    assert names(tmp_path) == ["aside-0-state-0001-000000", "state-0001-000000"]


def test_a_half_written_folder_of_a_killed_run_is_written_anew(tmp_path: Path) -> None:
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


def test_old_ones_go_but_milestones_stay(tmp_path: Path) -> None:
    for epoch in range(1, 6):
        write_checkpoint(tmp_path, state_at(epoch))
    prune_checkpoints(tmp_path, keep=2, milestones=[1])
    # Epoch 1, counted from 0, ends with the second one.
    assert names(tmp_path) == ["state-0002-000000", "state-0004-000000", "state-0005-000000"]


def test_pruning_that_is_killed_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for epoch in (1, 2):
        write_checkpoint(tmp_path, state_at(epoch))

    def killed(self: Path | str, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(tmp_path, keep=1, milestones=[])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["state-0002-000000"]
    assert ".state-0001-000000.gone" in names(tmp_path)


def test_later_ones_are_set_aside(tmp_path: Path) -> None:
    for epoch, batch in ((1, 0), (1, 4), (2, 0)):
        write_checkpoint(tmp_path, state_at(epoch, batch))
    assert [path.name for path in set_aside_later(tmp_path, epoch=1, batch=0)] == [
        "aside-0-state-0001-000004",
        "aside-0-state-0002-000000",
    ]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["state-0001-000000"]
    write_checkpoint(tmp_path, state_at(2))
    assert [path.name for path in set_aside_later(tmp_path, epoch=1, batch=0)] == ["aside-1-state-0002-000000"]


def test_what_is_a_checkpoint(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state_at(1))
    assert is_checkpoint(path)
    assert is_checkpoint(path.rename(tmp_path / "kept"))
    (tmp_path / "state-0004-000000").mkdir()
    assert is_checkpoint(tmp_path / "state-0004-000000")
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "state-0005-000000")
