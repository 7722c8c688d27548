"""Cached pixels equal the decoded ones, or they are decoded again, whatever happened to the files in between."""

import multiprocessing
import os
import pickle
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from linvit.data.cache import PixelCache

COUNT = 6


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{index}.jpg" for index in range(COUNT)]
    for path in paths:
        path.write_bytes(path.name.encode() * 10)
    return paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "val"


def pixels(index: int) -> np.ndarray:
    # Sizes that are not multiples of eight bytes, and one image of only zeros.
    shape = (5 + index, 7, 3)
    return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8) * np.uint8(index != 3)


class Decoder:
    """Records which images were decoded."""

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def __call__(self, index: int) -> Callable[[], np.ndarray]:
        def decode() -> np.ndarray:
            self.decoded.append(index)
            return pixels(index)

        return decode


def read_all(cache: PixelCache, sources: list[Path]) -> list[int]:
    """Check all pixels and return the indices of those that were decoded."""
    decoder = Decoder()
    for index, path in enumerate(sources):
        assert np.array_equal(cache.get(index, path, decoder(index)), pixels(index))
    return decoder.decoded


def test_pixels_are_decoded_once(folder: Path, sources: list[Path]) -> None:
    cache = PixelCache(folder, COUNT)
    assert cache.num_cached == 0
    assert read_all(cache, sources) == list(range(COUNT))
    assert cache.num_cached == COUNT
    assert read_all(cache, sources) == []
    # Also in a later run, and in a process that the cache was sent to.
    assert read_all(PixelCache(folder, COUNT), sources) == []
    assert read_all(pickle.loads(pickle.dumps(cache)), sources) == []


def test_cached_pixels_are_read_only(folder: Path, sources: list[Path]) -> None:
    cache = PixelCache(folder, COUNT)
    read_all(cache, sources)
    with pytest.raises(ValueError, match="read-only"):
        cache.get(0, sources[0], Decoder()(0))[:] = 0


def test_a_changed_source_is_decoded_again(folder: Path, sources: list[Path]) -> None:
    read_all(PixelCache(folder, COUNT), sources)
    cache = PixelCache(folder, COUNT)
    sources[1].write_bytes(b"longer than it was, by far" * 9)
    time = sources[2].stat().st_mtime_ns + 1
    os.utime(sources[2], ns=(time, time))
    sources[4].unlink()
    assert read_all(cache, sources) == [1, 2, 4]
    assert read_all(cache, sources) == []


def test_images_that_swapped_places_are_decoded_again(folder: Path, sources: list[Path]) -> None:
    for path in sources:
        os.utime(path, ns=(10**18, 10**18))
    read_all(PixelCache(folder, COUNT), sources)
    # The files have the same size and time, but different names.
    moved = [sources[index] for index in (1, 0, 2, 3, 4, 5)]
    assert read_all(PixelCache(folder, COUNT), moved) == [0, 1]


def test_an_image_in_an_archive_is_decoded_again_if_the_archive_changed(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "0.tar"
    archive.write_bytes(b"an archive")
    members = [archive / f"{index}.jpg" for index in range(COUNT)]
    cache = PixelCache(folder, COUNT)
    assert read_all(cache, members) == list(range(COUNT))
    assert read_all(cache, members) == []
    archive.write_bytes(b"another archive")
    assert read_all(cache, members) == list(range(COUNT))


def pixel_file(folder: Path) -> Path:
    (file,) = folder.glob("*.pixels")
    return file


def test_pixels_that_never_reached_the_disk_are_decoded_again(folder: Path, sources: list[Path]) -> None:
    read_all(PixelCache(folder, COUNT), sources)
    data = bytearray(pixel_file(folder).read_bytes())
    # Zeros in the second image, as a file system leaves them after a power failure.
    start = -(-pixels(0).nbytes // 8) * 8
    data[start + 8 : start + 64] = bytes(56)
    pixel_file(folder).write_bytes(data)
    assert read_all(PixelCache(folder, COUNT), sources) == [1]


@pytest.mark.parametrize("left", [0, 1, 200, 500])
def test_images_in_a_truncated_file_are_decoded_again(left: int, folder: Path, sources: list[Path]) -> None:
    read_all(PixelCache(folder, COUNT), sources)
    pixel_file(folder).write_bytes(pixel_file(folder).read_bytes()[:left])
    cache = PixelCache(folder, COUNT)
    assert max(read_all(cache, sources)) == COUNT - 1
    assert read_all(cache, sources) == []


def test_images_in_a_missing_file_are_decoded_again(folder: Path, sources: list[Path]) -> None:
    read_all(PixelCache(folder, COUNT), sources)
    pixel_file(folder).unlink()
    assert read_all(PixelCache(folder, COUNT), sources) == list(range(COUNT))


def test_any_damage_to_the_index_is_detected(folder: Path, sources: list[Path]) -> None:
    read_all(PixelCache(folder, COUNT), sources)
    intact = (folder / "index").read_bytes()
    size = len(intact) // COUNT
    rng = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(intact)
        damaged[2 * size + rng.integers(size)] ^= 1 << rng.integers(8)
        (folder / "index").write_bytes(damaged)
        assert read_all(PixelCache(folder, COUNT), sources) == [2]
    # The first half of one record and the second half of another.
    (folder / "index").write_bytes(intact[: size // 2] + intact[size + size // 2 : 2 * size] + intact[size:])
    assert read_all(PixelCache(folder, COUNT), sources) == [0]
    (folder / "index").write_bytes(intact[:-1])
    assert read_all(PixelCache(folder, COUNT), sources) == list(range(COUNT))


def test_processes_share_their_pixels(folder: Path, sources: list[Path]) -> None:
    cache = PixelCache(folder, COUNT)
    context = multiprocessing.get_context("fork")
    # Each process finds the pixels of the others, even those stored after it opened the cache.
    cache.get(0, sources[0], Decoder()(0))
    for index in range(1, COUNT):
        process = context.Process(target=read_all, args=(cache, sources[: index + 1]))
        process.start()
        process.join(20)
        assert process.exitcode == 0
        assert cache.num_cached == index + 1
        # Each process writes to its own file.
        assert len(list(folder.glob("*.pixels"))) == index + 1
        assert read_all(cache, sources[: index + 1]) == []


def test_files_that_grew_are_read_to_their_new_end(folder: Path, sources: list[Path]) -> None:
    writer, reader = PixelCache(folder, COUNT), PixelCache(folder, COUNT)
    for count in range(1, COUNT + 1):
        assert read_all(writer, sources[:count]) == [count - 1]
        assert read_all(reader, sources[:count]) == []


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_costs_one_warning(
    folder: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = PixelCache(folder, COUNT)
    cache.get(0, sources[0], Decoder()(0))
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(2**40, 2**40, 2**30))
    assert read_all(cache, sources) == list(range(1, COUNT))
    assert read_all(cache, sources) == list(range(1, COUNT))
    other = pickle.loads(pickle.dumps(cache))
    assert read_all(other, sources) == list(range(1, COUNT))
    warning = capfd.readouterr().err
    assert warning.count("\n") == 1
    assert f"{folder}: no more images are cached (no space left on device; 1.00 GiB is kept free)" in warning
    # A later run tries again.
    monkeypatch.undo()
    assert read_all(PixelCache(folder, COUNT), sources) == list(range(1, COUNT))


def test_one_warning_even_if_the_marker_cannot_be_written(
    folder: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = PixelCache(folder, COUNT)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(2**40, 2**40, 0))
    monkeypatch.setattr(PixelCache, "_full_marker", folder / "none" / "full")
    for _ in range(2):
        assert read_all(cache, sources) == list(range(COUNT))
    assert capfd.readouterr().err.count("\n") == 1


def test_half_written_pixels_are_not_cached(
    folder: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = PixelCache(folder, COUNT)
    cache.get(0, sources[0], Decoder()(0))

    class Full:
        """A file on a disk with room for 50 bytes."""

        room = 50

        def tell(self) -> int:
            return 1000

        def write(self, data: memoryview) -> int:
            taken = min(len(data), self.room)
            self.room -= taken
            if not taken:
                raise OSError(28, "No space left on device")
            return taken

    assert cache._own is not None
    cache._own = cache._own[0], Full()  # type: ignore[assignment]
    assert read_all(cache, sources) == list(range(1, COUNT))
    assert cache.num_cached == 1
    assert "no space left" in capfd.readouterr().err
