"""The index of many tars, and the copy of it that is kept."""

import os
from pathlib import Path

import numpy as np
import pytest
from tars import write_tar

from linvit.data import shardindex
from linvit.data.sources.tarindex import ShardIndex, index_shards


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shardindex, "_FEWEST_KEPT", 3)
    return [
        write_tar(tmp_path / "a.tar", {"x/1.jpg": b"one", "y/2.jpg": b"three"}),
        write_tar(tmp_path / "b.tar", {"y/1.jpg": b"two", "3.jpg": b"four"}),
    ]


def as_lists(index: ShardIndex) -> list:
    return [list(index.names), *(getattr(index, name).tolist() for name in ("shards", "offsets", "sizes", "codes"))]


def kept_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "linvit" / "shards").glob("*"))


def test_images_of_all_shards(shards: list[Path]) -> None:
    index = index_shards(shards)
    names = ["x/1.jpg", "y/2.jpg", "y/1.jpg", "3.jpg"]
    assert as_lists(index) == [names, [0, 0, 1, 1], [512, 1536, 512, 1536], [3, 5, 3, 4], [0, 1, 1, -1]]
    assert index.labels == ["x", "y"]


def test_a_kept_index_is_the_same_and_spares_the_tars(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_shards(shards)
    assert len(kept_files(tmp_path)) == 1
    monkeypatch.setattr(shardindex, "scan_tar", lambda path: pytest.fail(f"{path} is read again"))
    again = index_shards(shards)
    assert as_lists(again) == as_lists(index)
    assert again.labels == index.labels
    assert [getattr(again, name).dtype for name in ("shards", "codes")] == [np.int32, np.int32]


@pytest.mark.parametrize("change", ["size", "time", "damage", "version", "order"])
def test_a_kept_index_that_is_not_of_these_tars_is_not_used(
    change: str, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_shards(shards)
    (kept,) = kept_files(tmp_path)
    # Of the same size, with other labels.
    state = shards[0].stat()
    write_tar(shards[0], {"z/1.jpg": b"one", "y/2.jpg": b"three"})
    os.utime(shards[0], ns=(state.st_atime_ns, state.st_mtime_ns + (change == "time")))
    if change == "size":
        write_tar(shards[0], {f"z/{number}.jpg": b"one" for number in range(40)})
        os.utime(shards[0], ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "damage":
        kept.write_bytes(kept.read_bytes()[:-200])
    elif change == "version":
        monkeypatch.setattr(shardindex, "_VERSION", 2)
    elif change == "order":
        shards.reverse()
    assert "z" in index_shards(shards).labels


def test_small_sets_leave_nothing_behind(shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shardindex, "_FEWEST_KEPT", 5)
    index_shards(shards)
    assert not kept_files(tmp_path)


def test_an_index_that_cannot_be_kept_does_no_harm(shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(index_shards(shards).names) == 4


def test_a_missing_shard_is_named(shards: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"c\.tar: cannot be read"):
        index_shards([*shards, shards[0].with_name("c.tar")])
