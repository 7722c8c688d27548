"""A cache of decoded images for later epochs, in files that all processes of a machine share.

`ImageCache` caches a data set after a deterministic crop, on disk or in memory. `PixelCache` stores the pixels: each
process appends to a file of its own and then writes the position into a shared index. Nothing is locked. Every index
record and all pixels carry checksums, so whatever a crash or a concurrent write left inconsistent is decoded again.
`shared_memory_folder` provides folders in memory that disappear with the last process that uses them.
"""

import atexit
import errno
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b, sha256
from io import FileIO
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch

from linvit.data.augment.build import Pipeline
from linvit.data.decode import InputRange, UnreadableImage, decode_image, reducible_size
from linvit.data.geometry import Crop
from linvit.data.options import CacheOptions
from linvit.data.sources.base import ImageSet
from linvit.output.terminal import format_bytes, note

# Increase it when the pixels or their format change.
_FORMAT = 2
# The size of a cache is estimated from this many images.
_SAMPLE_SIZE = 32
# Space left free for other programs; in memory, workers need it to hand over batches.
_RESERVED_BYTES = 2**30
# Linux keeps files below this folder in memory.
_MEMORY = Path("/dev/shm")
_LOCK = "lock"
_RECORD = np.dtype(
    [
        ("file", "<u8"),  # its name, as a number
        ("offset", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("source", "<u8"),  # fingerprint of the file that the pixels were decoded from
        ("pixels", "<u8"),  # checksum of the pixels
        ("check", "<u8"),  # checksum of this record
    ]
)


class ImageCache:
    """The images of a data set after a crop, which must not be random; each is decoded once and then stored.

    Args:
        options: where to store the pixels; `cache` must be set.
        input_range: see `decode_image`.

    Raises:
        ValueError: if the system has no folder in memory.
        OSError: if the cache folder cannot be written.
    """

    def __init__(
        self, options: CacheOptions, dataset: ImageSet, crop: Crop, *, input_range: InputRange | None = None
    ) -> None:
        self.crop = crop
        self._dataset = dataset
        self._pipeline = Pipeline(crop, A.Compose([]), input_range=input_range)
        name = f"{dataset.split}-{_key(dataset, crop, input_range)}".replace(os.sep, "-")
        if options.cache == "memory":
            self._pixels = PixelCache(shared_memory_folder(name), len(dataset))
            return
        assert options.cache_dir is not None
        try:
            self._pixels = PixelCache(options.cache_dir / name, len(dataset))
        except OSError as error:
            raise OSError(
                f"cache_dir {options.cache_dir}: cannot be written ({error.strerror}); choose another folder"
            ) from error

    def read(self, index: int) -> np.ndarray:
        """The image, (H, W, 3) uint8 and read-only; raises UnreadableImage, which names it, if it cannot be read."""
        path = self._dataset.path(index)
        return self._pixels.get(index, path, lambda: self._pipeline.read(self._dataset.read_bytes(index), name=path))

    def describe(self) -> str:
        """One line for the user: the folder, the number of cached images, and the space needed and free."""
        free = shutil.disk_usage(self._pixels.folder).free
        return (
            f"cache {self._pixels.folder}: holds {self._pixels.num_cached:,} of {len(self._dataset):,} images; the "
            f"full set needs about {format_bytes(self._estimate_bytes())}, and {format_bytes(free)} is free"
        )

    def _estimate_bytes(self) -> int:
        """Size of all images after the crop, estimated from a sample."""
        count = len(self._dataset)
        sizes = []
        for index in np.linspace(0, count - 1, min(_SAMPLE_SIZE, count)).astype(int).tolist():
            try:
                data = self._dataset.read_bytes(index)
                shape = reducible_size(data) or decode_image(data, name=self._dataset.path(index)).shape
            except UnreadableImage:
                continue
            height, width = self.crop.plan(*shape[:2]).size
            sizes.append(3 * height * width)
        return round(count * float(np.mean(sizes))) if sizes else 0


def _key(dataset: ImageSet, crop: Crop, input_range: InputRange | None) -> str:
    """A hash of everything that decides the pixels, except for the image files themselves."""
    facts = (
        _FORMAT,
        cv2.__version__,
        torch.__version__,
        os.path.abspath(dataset.root),
        len(dataset),
        repr(crop),
        *(input_range or ()),
    )
    return sha256(repr(facts).encode()).hexdigest()[:16]


class PixelCache:
    """Pixels of the images of one data set, by index.

    Args:
        folder: folder of the cache files, created if missing. All its content must come from the same crop.
        num_images: number of images in the data set.
    """

    def __init__(self, folder: Path, num_images: int) -> None:
        self.folder = folder
        self._num_images = num_images
        folder.mkdir(parents=True, exist_ok=True)
        _create_index(self._index_file, num_images)
        self._full_marker.unlink(missing_ok=True)
        self._reset()

    def _reset(self) -> None:
        """Start with fresh state, which each process has for itself."""
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
        self._reset()

    def get(self, index: int, path: Path, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The pixels of an image, (H, W, 3) uint8 and read-only: the cached ones, or those that `decode` returns.

        Args:
            path: the image's file, or a name inside an archive. If the file has changed, its pixels are decoded again.
        """
        if self._process != os.getpid():
            self._reset()
        source = file_fingerprint(path)
        image = self._find(index, source)
        if image is None:
            image = decode()
            self._store(index, source, image)
        return image

    @property
    def num_cached(self) -> int:
        """Number of images in the cache."""
        return int(np.count_nonzero(self._records()["check"]))

    def _records(self) -> np.ndarray:
        if self._index is None:
            self._index = np.memmap(self._index_file, _RECORD, "r+", shape=(self._num_images,))
        return self._index

    def _find(self, index: int, source: int) -> np.ndarray | None:
        """The cached pixels, or None if they are missing, damaged or from a different source."""
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
                # The file is missing or empty.
                return None
        return mapped[offset:end].reshape(shape) if len(mapped) >= end else None

    def _store(self, index: int, source: int, image: np.ndarray) -> None:
        if self._is_full:
            return
        try:
            if shutil.disk_usage(self.folder).free < _RESERVED_BYTES + image.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file, offset = self._append(image)
        except OSError as error:
            self._stop_storing(error)
            return
        record = np.zeros((), _RECORD)
        record["file"], record["offset"] = file, offset
        record["height"], record["width"] = image.shape[:2]
        record["source"], record["pixels"] = source, _pixel_check(image)
        record["check"] = _record_check(record)
        self._records()[index] = record
        self._verified[index] = True

    def _append(self, image: np.ndarray) -> tuple[int, int]:
        """Append pixels to this process's file; returns its number and their offset, a multiple of eight."""
        if self._own is None:
            file = secrets.randbits(63)
            self._own = file, self._pixel_file(file).open("xb", buffering=0)
        file, handle = self._own
        offset = handle.tell()
        rest = memoryview(image.tobytes() + b"\0" * (-image.nbytes % 8))
        # A nearly full disk accepts part of the data and refuses the next write.
        while rest:
            rest = rest[handle.write(rest) :]
        return file, offset

    def _stop_storing(self, error: OSError) -> None:
        self._is_full = True
        try:
            self._full_marker.open("x").close()
        except FileExistsError:
            # Another process has printed the warning.
            return
        except OSError:
            pass
        note(
            f"warning: {self.folder}: no more images are cached ({(error.strerror or str(error)).lower()}; "
            f"{format_bytes(_RESERVED_BYTES)} is kept free); the others are read from their files each time"
        )

    @property
    def _index_file(self) -> Path:
        return self.folder / "index"

    @property
    def _full_marker(self) -> Path:
        return self.folder / "full"

    def _pixel_file(self, file: int) -> Path:
        return self.folder / f"{file:016x}.pixels"


def _create_index(path: Path, num_images: int) -> None:
    size = num_images * _RECORD.itemsize
    if path.exists() and path.stat().st_size == size:
        return
    # Processes may do this at the same time. All bytes are written, because mapping a sparse file fails on a full disk.
    scratch = path.with_name(f".index-{os.getpid()}.part")
    scratch.write_bytes(bytes(size))
    scratch.replace(path)


def file_fingerprint(path: Path) -> int:
    """A hash of the path and of the file's size and modification time; of the archive's, for a name in an archive."""
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
    # The start value of 1 keeps a record of zeros invalid.
    return zlib.crc32(record.tobytes()[: -_RECORD["check"].itemsize], 1)


def _pixel_check(image: np.ndarray) -> int:
    """A sum of eight-byte words, as fast as memory; it detects zeros in place of pixels that never reached the disk."""
    pixels = np.ascontiguousarray(image).reshape(-1)
    end = len(pixels) // 8 * 8
    rest = int.from_bytes(pixels[end:].tobytes(), "little")
    return (int(pixels[:end].view(np.uint64).sum(dtype=np.uint64)) + rest) % 2**64


def shared_memory_folder(name: str) -> Path:
    """A folder in memory, which all processes of this user share by its name.

    It is deleted when the last of these processes ends. If that process was killed, the next call, with any name,
    deletes it.

    Raises:
        ValueError: if the system has no /dev/shm, or another user could change the folder.
    """
    if sys.platform != "linux" or not _MEMORY.is_dir():
        raise ValueError("cache memory needs /dev/shm, which this system lacks; set cache disk and a cache_dir")
    import fcntl

    parent = _MEMORY / f"linvit-{os.getuid()}"
    with suppress(FileExistsError):
        # Other users can neither read nor write it.
        parent.mkdir(mode=0o700)
    _refuse_strange(parent)
    for other in parent.iterdir():
        try:
            _release(other, os.open(other / _LOCK, os.O_RDWR | os.O_NONBLOCK))
        except (FileNotFoundError, NotADirectoryError):
            # Another process has just created or deleted it, or it is not a cache.
            continue
    folder = parent / name
    while True:
        folder.mkdir(exist_ok=True)
        try:
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            # Another process has just deleted the folder.
            continue
        fcntl.flock(handle, fcntl.LOCK_SH)
        if _is_current(folder / _LOCK, handle):
            break
        os.close(handle)
    atexit.register(_release, folder, handle)
    return folder


def _refuse_strange(folder: Path) -> None:
    """Raise ValueError for a folder that somebody else has made, since everybody may write to its parent."""
    status = folder.lstat()
    if not S_ISDIR(status.st_mode):
        wrong = "is not a folder"
    elif status.st_uid != os.getuid():
        wrong = f"belongs to user {status.st_uid}, who could change the images"
    elif status.st_mode & 0o077:
        wrong = "is open to other users, who could change the images"
    else:
        return
    raise ValueError(f"cache memory: {folder} {wrong}; remove it, or set cache disk")


def _is_current(lock: Path, handle: int) -> bool:
    """Whether the open file is still the one with this path."""
    try:
        return lock.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def _release(folder: Path, handle: int) -> None:
    """Close the lock, and delete the folder if no other process holds it."""
    if sys.platform == "linux":
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            shutil.rmtree(folder, ignore_errors=True)
    os.close(handle)
