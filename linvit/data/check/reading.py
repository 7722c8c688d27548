"""Inspecting all images of a listing, a chunk at a time, into arrays with a row per image."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np

from linvit.data.check.faults import Finding
from linvit.data.check.inspection import THUMBNAIL, inspect
from linvit.data.check.messages import DecoderMessages
from linvit.data.check.perceptual import hash_thumbnails
from linvit.data.check.pool import Pool
from linvit.data.read import UnreadableImage

CHUNK = 32
SMALL = 16


class Source(Protocol):
    """Where images are read from; it is copied to every process."""

    def read(self, index: int, path: str) -> bytes:
        """The bytes of an image of the listing; UnreadableImage where it cannot be opened."""


class FolderSource:
    """Image files by their paths below a folder."""

    def __init__(self, root: Path) -> None:
        self._root = os.fspath(root)

    def read(self, index: int, path: str) -> bytes:
        file = os.path.join(self._root, path)
        try:
            # What `read_file` does, without the time that a Path takes.
            with open(file, "rb", buffering=0) as handle:
                return handle.read()
        except OSError as error:
            raise UnreadableImage(f"{file}: cannot be read ({error.strerror})") from error


class Reader:
    """What a process needs to inspect images; entered, it also catches what decoders print."""

    def __init__(self, source: Source, *, max_pixels: int) -> None:
        self.source = source
        self.max_pixels = max_pixels
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self.messages = self._open.enter_context(DecoderMessages())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()


@dataclass(frozen=True)
class Measurements:
    """A row per image: width and height (0 where it was not decoded), bytes, their checksum, a perceptual hash,
    a thumbnail (16, 16) uint8 grey, and the channels' means and mean squares (3,), 0 to 255: those of the pixels
    where an image was decoded whole.
    """

    sizes: np.ndarray
    num_bytes: np.ndarray
    checksums: np.ndarray
    hashes: np.ndarray
    thumbnails: np.ndarray
    means: np.ndarray
    squares: np.ndarray

    @classmethod
    def empty(cls, count: int) -> Self:
        return cls(
            sizes=np.zeros((count, 2), np.int32),
            num_bytes=np.zeros(count, np.int64),
            checksums=np.zeros(count, np.uint64),
            hashes=np.zeros(count, np.uint64),
            thumbnails=np.zeros((count, SMALL, SMALL), np.uint8),
            means=np.zeros((count, 3), np.float32),
            squares=np.zeros((count, 3), np.float32),
        )

    @property
    def decoded(self) -> np.ndarray:
        """Which images were decoded, (N,) bool."""
        return self.sizes[:, 0] > 0

    def fill(self, first: int, part: "Measurements") -> None:
        """Put the rows of `part` in place from `first` on."""
        for name, values in vars(part).items():
            getattr(self, name)[first : first + len(values)] = values


class _Task(NamedTuple):
    first: int
    paths: list[str]
    whole: np.ndarray


class _Result(NamedTuple):
    first: int
    findings: list[Finding]
    measurements: Measurements


def read_all(
    pool: Pool[Reader], paths: Sequence[str], whole: np.ndarray, on_images: Callable[[int], None]
) -> tuple[Measurements, list[Finding]]:
    """Inspect every image; `on_images` is told how many more are done.

    Those of `whole`, (N,) bool, are decoded whole, the others perhaps at a reduced size.
    """
    measurements = Measurements.empty(len(paths))
    findings: list[Finding] = []
    chunks = (slice(first, first + CHUNK) for first in range(0, len(paths), CHUNK))
    tasks = (_Task(chunk.start, list(paths[chunk]), whole[chunk]) for chunk in chunks)
    for result in pool.map(_inspect_chunk, tasks):
        measurements.fill(result.first, result.measurements)
        findings += result.findings
        on_images(len(result.measurements.sizes))
    return measurements, findings


def _inspect_chunk(reader: Reader, task: _Task) -> _Result:
    count = len(task.paths)
    rows = Measurements.empty(count)
    findings = []
    thumbnails = np.zeros((count, THUMBNAIL, THUMBNAIL), np.uint8)
    colours = np.zeros((2, count, 3))
    for row, (path, whole) in enumerate(zip(task.paths, task.whole.tolist())):
        try:
            data = reader.source.read(task.first + row, path)
        except UnreadableImage as error:
            cause = error.__cause__
            reason = cause.strerror.lower() if isinstance(cause, OSError) and cause.strerror else str(error)
            findings.append(Finding("unreadable_file", path, reason))
            continue
        inspection = inspect(data, path, max_pixels=reader.max_pixels, whole=whole, messages=reader.messages)
        findings += [Finding(code, path, detail) for code, detail in inspection.findings]
        rows.num_bytes[row], rows.checksums[row] = inspection.num_bytes, inspection.checksum
        pixels = inspection.pixels
        if pixels is not None:
            rows.sizes[row] = pixels.width, pixels.height
            colours[0, row], colours[1, row] = pixels.means[:, 0], pixels.deviations[:, 0]
            thumbnails[row] = pixels.thumbnail
    means, deviations = colours
    rows.means[:], rows.squares[:] = means, means**2 + deviations**2
    rows.hashes[:] = hash_thumbnails(thumbnails)
    # Averages of 2 x 2, which slices give ten times as fast as a sum over axes.
    parts = [thumbnails[:, i::2, j::2].astype(np.uint16) for i in (0, 1) for j in (0, 1)]
    rows.thumbnails[:] = sum(parts[1:], parts[0]) // 4
    return _Result(task.first, findings, rows)
