"""What the cache stores and where, its messages, and folders in memory that exist only while a process uses them."""

import atexit
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from linvit.data import cache as cache_module
from linvit.data.cache import ImageCache, shared_memory_folder
from linvit.data.decode import UnreadableImage
from linvit.data.geometry import Crop, EvalCrop, FitShorterSide
from linvit.data.options import CacheOptions
from linvit.data.sources.folder import ImageFolder, open_folder

MakeFolder = Callable[..., Path]


@pytest.fixture
def folder(make_folder: MakeFolder) -> ImageFolder:
    return open_folder(make_folder({"train": {"a": 3, "b": 4}}), split="train")


@pytest.fixture
def options(tmp_path: Path) -> CacheOptions:
    return CacheOptions(cache="disk", cache_dir=tmp_path / "cache")


def cache_folders(options: CacheOptions) -> set[str]:
    assert options.cache_dir is not None
    return {path.name for path in options.cache_dir.iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="the folder is in /dev/shm")
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("link", "is not a folder"),
        ("file", "is not a folder"),
        ("mode", "is open to other users"),
        ("owner", "belongs to"),
    ],
)
def test_a_folder_in_memory_that_somebody_else_may_change_is_refused(
    wrong: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_MEMORY", tmp_path)
    folder = tmp_path / f"linvit-{os.getuid()}"
    if wrong == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif wrong == "file":
        folder.touch()
    else:
        folder.mkdir(mode=0o700)
    if wrong == "mode":
        folder.chmod(0o770)
    if wrong == "owner":
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        folder.rename(tmp_path / f"linvit-{os.getuid()}")
    with pytest.raises(ValueError, match=rf"cache memory: .*linvit-\d+ {words}.*remove it, or set cache disk"):
        shared_memory_folder("val")


@pytest.mark.skipif(sys.platform != "linux", reason="the folder is in /dev/shm")
def test_other_things_in_the_folder_in_memory_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_MEMORY", tmp_path)
    folder = tmp_path / f"linvit-{os.getuid()}"
    folder.mkdir(mode=0o700)
    (folder / "file").touch()
    assert shared_memory_folder("val").parent == folder
    assert (folder / "file").exists()


def test_images_are_cropped_and_cached(folder: ImageFolder, options: CacheOptions) -> None:
    crop = FitShorterSide(20)
    for _ in range(2):
        cache = ImageCache(options, folder, crop)
        for index in range(len(folder)):
            image = cache.read(index)
            assert image.shape == (20, 26, 3)
            assert np.array_equal(image, crop.plan(40, 52).apply(folder.read(index)))
    assert len(cache_folders(options)) == 1


def test_small_images_are_cached_unchanged(folder: ImageFolder, options: CacheOptions) -> None:
    cache = ImageCache(options, folder, FitShorterSide(41))
    assert np.array_equal(cache.read(2), folder.read(2))


def test_every_crop_and_decoder_has_its_own_folder(
    folder: ImageFolder, options: CacheOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops: list[Crop] = [
        FitShorterSide(20),
        FitShorterSide(21),
        EvalCrop((20, 20)),
        EvalCrop((20, 20), crop_pct=0.9),
        EvalCrop((20, 20), interpolation="bilinear"),
        EvalCrop((20, 20), crop_mode="border"),
        EvalCrop((20, 20), crop_mode="border", fill=(1, 2, 3)),
    ]
    for crop in (*crops, FitShorterSide(20)):
        ImageCache(options, folder, crop)
    assert len(cache_folders(options)) == len(crops)
    # A different version of the decoder may give different pixels.
    monkeypatch.setattr("cv2.__version__", "4.0.0")
    ImageCache(options, folder, FitShorterSide(20))
    assert len(cache_folders(options)) == len(crops) + 1


def test_a_broken_image_is_named_each_time(folder: ImageFolder, options: CacheOptions) -> None:
    folder.path(1).write_bytes(b"not an image")
    cache = ImageCache(options, folder, FitShorterSide(20))
    for _ in range(2):
        with pytest.raises(UnreadableImage, match=f"{folder.path(1).name}: is truncated"):
            cache.read(1)


def test_the_description_has_the_folder_and_the_space_needed(folder: ImageFolder, options: CacheOptions) -> None:
    folder.path(0).write_bytes(b"not an image")
    cache = ImageCache(options, folder, FitShorterSide(20))
    cache.read(3)
    line = cache.describe()
    assert f"{options.cache_dir}/train-" in line
    assert "holds 1 of 7 images" in line
    assert "the full set needs about 11 KiB, and " in line
    assert line.endswith("GiB is free")
    assert cache._estimate_bytes() == 7 * 20 * 26 * 3


def test_a_folder_that_cannot_be_written_is_named(folder: ImageFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = CacheOptions(cache="disk", cache_dir=tmp_path / "file")
    with pytest.raises(OSError, match=r"cache_dir .*file: cannot be written \(.*\); choose another folder"):
        ImageCache(options, folder, FitShorterSide(20))


needs_memory_folder = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory")


class User:
    """Another process, which uses a folder. It is forked, since a new interpreter takes seconds to load torch."""

    def __init__(self, memory: Path, name: str) -> None:
        fork = multiprocessing.get_context("fork")
        self.connection, theirs = fork.Pipe()
        self.process = fork.Process(target=_use, args=(memory, name, theirs), daemon=True)
        self.process.start()
        self.folder: Path = self.connection.recv()

    def leave(self) -> None:
        self.connection.send("leave")
        self.process.join(timeout=20)
        assert self.process.exitcode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join(timeout=20)


def _use(memory: Path, name: str, connection: Connection) -> None:
    """Open the folder, send its path, and stay until told to leave."""
    # What the test's process does when it exits is not this one's business.
    atexit._clear()
    cache_module._MEMORY = memory
    folder = shared_memory_folder(name)
    (folder / "data").write_text("pixels")
    connection.send(folder)
    connection.recv()
    # A forked process ends without calling these.
    atexit._run_exitfuncs()


@pytest.fixture
def users(tmp_path: Path) -> Iterator[list[User]]:
    users: list[User] = []
    yield users
    for user in users:
        if user.process.is_alive():
            user.kill()


@needs_memory_folder
def test_the_last_process_deletes_the_folder(tmp_path: Path, users: list[User]) -> None:
    users += [User(tmp_path, "val"), User(tmp_path, "val")]
    first, second = users
    assert first.folder == second.folder == tmp_path / f"linvit-{os.getuid()}" / "val"
    first.leave()
    assert (second.folder / "data").read_text() == "pixels"
    second.leave()
    assert not second.folder.exists()


@needs_memory_folder
def test_the_next_process_deletes_the_folder_of_a_killed_one(tmp_path: Path, users: list[User]) -> None:
    users += [User(tmp_path, "dead"), User(tmp_path, "alive")]
    dead, alive = users
    dead.kill()
    assert dead.folder.exists()
    users.append(User(tmp_path, "new"))
    assert not dead.folder.exists()
    assert alive.folder.exists()


def test_a_system_without_folders_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_MEMORY", tmp_path / "none")
    with pytest.raises(ValueError, match=r"cache memory needs /dev/shm.*set cache disk and a cache_dir"):
        shared_memory_folder("val")
