"""Decoded images kept for later epochs, in files that all processes of a machine share.

A process appends the pixels of an image to a file of its own, and then writes into the shared index where they lie.
Nothing is locked: a record that two processes wrote at once, or that a crash left half written, does not fit its own
checksum, and the pixels that it names must fit theirs. What does not fit is decoded anew.

Folders in memory that processes share, and that do not outlive them.

Where cached images lie, and how much room they take.
"""

import atexit
import errno
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Callable
from hashlib import blake2b, sha256
from io import FileIO
from pathlib import Path
from stat import S_ISREG
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch

from linvit.data.augment.build import Pipeline
from linvit.data.decode import UnreadableImage, decode_image, reducible_size
from linvit.data.geometry import Crop
from linvit.data.options import CacheOptions
from linvit.data.sources.base import ImageSet

_RECORD = np.dtype(
    [
        ("file", "<u8"),  # its name, as a number
        ("offset", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("source", "<u8"),  # what the pixels were decoded from
        ("pixels", "<u8"),  # their checksum
        ("check", "<u8"),  # the checksum of this record
    ]
)
# Left free on the disk: other programs write there, and in memory workers hand over their batches.
_SPARED = 2**30


class PixelCache:
    """Pixels of the images of one set, by index.

    Args:
        folder: for the files; made if need be. What it holds must have been made in the same way.
        num_images: in the set.
    """

    def __init__(self, folder: Path, num_images: int) -> None:
        self.folder = folder
        self._num_images = num_images
        folder.mkdir(parents=True, exist_ok=True)
        _create_index(self._index_file, num_images)
        self._full_file.unlink(missing_ok=True)
        self._begin()

    def _begin(self) -> None:
        """What each process has for itself."""
        self._process = os.getpid()
        self._index: np.ndarray | None = None
        self._maps: dict[int, np.ndarray] = {}
        self._verified = np.zeros(self._num_images, bool)
        self._own: tuple[int, FileIO] | None = None
        self._is_full = False

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_num_images": self._num_images}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def get(self, index: int, path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The pixels of an image, (H, W, 3) uint8 and not to be written to: those kept, or else those `make` gives.

        Args:
            path: the file that the image lies in, or a name in an archive; if it has changed, pixels are made anew.
        """
        if self._process != os.getpid():
            self._begin()
        source = _fingerprint(path)
        image = self._find(index, source)
        if image is None:
            image = make()
            self._keep(index, source, image)
        return image

    @property
    def num_kept(self) -> int:
        """Images whose pixels are kept."""
        return int(np.count_nonzero(self._records()["check"]))

    def _records(self) -> np.ndarray:
        if self._index is None:
            self._index = np.memmap(self._index_file, _RECORD, "r+", shape=(self._num_images,))
        return self._index

    def _find(self, index: int, source: int) -> np.ndarray | None:
        record = self._records()[index].copy()
        if record["check"] != _record_check(record) or record["source"] != source:
            return None
        shape = int(record["height"]), int(record["width"]), 3
        image = self._map(int(record["file"]), int(record["offset"]), shape)
        if image is None:
            return None
        if not self._verified[index]:
            if _pixel_check(image) != record["pixels"]:
                return None
            self._verified[index] = True
        return image

    def _map(self, file: int, offset: int, shape: tuple[int, int, int]) -> np.ndarray | None:
        end = offset + int(np.prod(shape))
        mapped = self._maps.get(file)
        if mapped is None or len(mapped) < end:
            try:
                mapped = self._maps[file] = np.asarray(np.memmap(self._pixel_file(file), np.uint8, "r"))
            except (OSError, ValueError):
                # Gone, or empty.
                return None
        return mapped[offset:end].reshape(shape) if len(mapped) >= end else None

    def _keep(self, index: int, source: int, image: np.ndarray) -> None:
        if self._is_full:
            return
        try:
            if shutil.disk_usage(self.folder).free < _SPARED + image.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file, offset = self._append(image)
        except OSError as error:
            self._stop(error)
            return
        record = np.zeros((), _RECORD)
        record["file"], record["offset"] = file, offset
        record["height"], record["width"] = image.shape[:2]
        record["source"], record["pixels"] = source, _pixel_check(image)
        record["check"] = _record_check(record)
        self._records()[index] = record
        self._verified[index] = True

    def _append(self, image: np.ndarray) -> tuple[int, int]:
        """Writes pixels; returns the file's number and where in it they begin, a multiple of eight."""
        if self._own is None:
            file = secrets.randbits(63)
            self._own = file, self._pixel_file(file).open("xb", buffering=0)
        file, handle = self._own
        offset = handle.tell()
        rest = memoryview(image.tobytes() + b"\0" * (-image.nbytes % 8))
        # A nearly full disk takes a part and refuses the next.
        while rest:
            rest = rest[handle.write(rest) :]
        return file, offset

    def _stop(self, error: OSError) -> None:
        self._is_full = True
        try:
            self._full_file.open("x").close()
        except FileExistsError:
            # Another process has said it.
            return
        except OSError:
            pass
        print(
            f"warning: {self.folder}: the cache takes no more ({(error.strerror or str(error)).lower()}, "
            f"{_SPARED // 2**30} GiB is left free); the other images are read from their files each time",
            file=sys.stderr,
            flush=True,
        )

    @property
    def _index_file(self) -> Path:
        return self.folder / "index"

    @property
    def _full_file(self) -> Path:
        return self.folder / "full"

    def _pixel_file(self, file: int) -> Path:
        return self.folder / f"{file:016x}.pixels"


def _create_index(path: Path, num_images: int) -> None:
    size = num_images * _RECORD.itemsize
    if path.exists() and path.stat().st_size == size:
        return
    # Processes may do this at once; written in full, since a map of a file with holes fails where the disk is full.
    scratch = path.with_name(f".index-{os.getpid()}.part")
    scratch.write_bytes(bytes(size))
    scratch.replace(path)


def _fingerprint(path: Path) -> int:
    """Changes with the file's name, size and time of change; those of the archive for a name in one."""
    facts = os.path.abspath(path)
    for file in (path, *path.parents):
        try:
            status = file.stat()
        except OSError:
            continue
        if S_ISREG(status.st_mode):
            facts += f"\0{status.st_size} {status.st_mtime_ns}"
        break
    return int.from_bytes(blake2b(os.fsencode(facts), digest_size=8).digest(), "little")


def _record_check(record: np.ndarray) -> int:
    # Not of nothing, so that a record of zeros does not fit.
    return zlib.crc32(record.tobytes()[: -_RECORD["check"].itemsize], 1)


def _pixel_check(image: np.ndarray) -> int:
    """A sum over words of eight bytes, at the speed of memory: pixels that never reached the disk are zeros."""
    pixels = np.ascontiguousarray(image).reshape(-1)
    whole = len(pixels) // 8 * 8
    rest = int.from_bytes(pixels[whole:].tobytes(), "little")
    return (int(pixels[:whole].view(np.uint64).sum(dtype=np.uint64)) + rest) % 2**64


# Linux keeps the files below it in memory.
_MEMORY = Path("/dev/shm")
_LOCK = "lock"


def share_memory_folder(name: str) -> Path:
    """A folder in memory, the same for all processes of this user that ask for it.

    It is deleted when the last of them ends. Where that one was killed, the next call, for any name, deletes it.

    Raises:
        ValueError: where the system has no such folders.
    """
    if sys.platform != "linux" or not _MEMORY.is_dir():
        raise ValueError("cache memory needs /dev/shm, which this system lacks; set cache disk and a cache_dir")
    import fcntl

    # Named for the user: to others it is closed.
    parent = _MEMORY / f"linvit-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    for other in parent.iterdir():
        _delete_unless_used(other)
    while True:
        (parent / name).mkdir(exist_ok=True)
        try:
            handle = os.open(parent / name / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            # Another process has just deleted it.
            continue
        fcntl.flock(handle, fcntl.LOCK_SH)
        if _is_there(parent / name / _LOCK, handle):
            break
        os.close(handle)
    atexit.register(_leave, parent / name, handle)
    return parent / name


def _is_there(lock: Path, handle: int) -> bool:
    try:
        return lock.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def _delete_unless_used(folder: Path) -> None:
    try:
        handle = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        # Just made, or just deleted.
        return
    _leave(folder, handle)


def _leave(folder: Path, handle: int) -> None:
    """Deletes the folder if no other process holds its lock."""
    if sys.platform == "linux":
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            shutil.rmtree(folder, ignore_errors=True)
    os.close(handle)


# Another number for other pixels, or another way to keep them.
_FORMAT = 1
# The sizes of so many images tell those of all.
_SAMPLED = 32
_GIB = 2**30


class ImageCache:
    """The images of a set as a crop, which must not be random, leaves them: cut once and kept.

    Args:
        options: where they are kept; `cache` must be set.

    Raises:
        ValueError: where the system keeps no files in memory.
        OSError: where the folder cannot be written.
    """

    def __init__(self, options: CacheOptions, dataset: ImageSet, crop: Crop) -> None:
        self.crop = crop
        self._dataset = dataset
        self._pipeline = Pipeline(crop, A.Compose([]))
        name = f"{dataset.split}-{_key(dataset, crop)}".replace(os.sep, "-")
        if options.cache == "memory":
            self._pixels = PixelCache(share_memory_folder(name), len(dataset))
            return
        assert options.cache_dir is not None
        try:
            self._pixels = PixelCache(options.cache_dir / name, len(dataset))
        except OSError as error:
            raise OSError(
                f"cache_dir {options.cache_dir}: cannot be written ({error.strerror}); set another"
            ) from error

    def read(self, index: int) -> np.ndarray:
        """The image, (H, W, 3) uint8 and not to be written to; UnreadableImage, naming it, where it cannot be read."""
        path = self._dataset.path(index)
        return self._pixels.get(index, path, lambda: self._pipeline.read(self._dataset.read_bytes(index), name=path))

    def describe(self) -> str:
        """One line for the user: where the cache lies, what it holds, and the room that it takes and has."""
        free = shutil.disk_usage(self._pixels.folder).free / _GIB
        return (
            f"cache {self._pixels.folder}: holds {self._pixels.num_kept:,} of {len(self._dataset):,} images; all take "
            f"about {self._estimate_bytes() / _GIB:,.2f} GiB, {free:,.1f} GiB are free"
        )

    def _estimate_bytes(self) -> int:
        """What the images take once they are cut, from the sizes of some."""
        count = len(self._dataset)
        sizes = []
        for index in np.linspace(0, count - 1, min(_SAMPLED, count)).astype(int).tolist():
            try:
                data = self._dataset.read_bytes(index)
                shape = reducible_size(data) or decode_image(data, name=self._dataset.path(index)).shape
            except UnreadableImage:
                continue
            height, width = self.crop.cut(*shape[:2]).size
            sizes.append(3 * height * width)
        return round(count * float(np.mean(sizes))) if sizes else 0


def _key(dataset: ImageSet, crop: Crop) -> str:
    """Differs where pixels may, beside each image's file."""
    made = (_FORMAT, cv2.__version__, torch.__version__, os.path.abspath(dataset.root), len(dataset), repr(crop))
    return sha256(repr(made).encode()).hexdigest()[:16]
