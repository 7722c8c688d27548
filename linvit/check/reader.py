"""Reading and inspecting all images of a listing, in several processes."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np

from linvit.check.faults import Finding
from linvit.check.inspect import THUMBNAIL, DecoderMessages, inspect
from linvit.check.perceptual import hash_thumbnails
from linvit.check.pool import Pool
from linvit.data.decode import InputRange, UnreadableImage, read_file

# Images per task of a process.
_CHUNK = 32
# Side in pixels of the thumbnails kept in memory.
_SMALL_THUMBNAIL = THUMBNAIL // 2


class Source(Protocol):
    """A source of images. Each process gets a copy."""

    def read(self, index: int, path: str) -> bytes:
        """The bytes of an image of the listing; raises UnreadableImage if it cannot be opened."""


class FolderSource:
    """Image files, by their paths below a folder."""

    def __init__(self, root: Path) -> None:
        self._root = os.fspath(root)

    def read(self, index: int, path: str) -> bytes:
        return read_file(os.path.join(self._root, path))


class Reader:
    """A context that a process needs to inspect images; it captures what decoders print."""

    def __init__(self, source: Source, *, max_pixels: int, input_range: InputRange | None = None) -> None:
        self.source = source
        self.max_pixels = max_pixels
        self.input_range = input_range
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.messages = self._stack.enter_context(DecoderMessages())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


@dataclass(frozen=True)
class Measurements:
    """Numbers of N images, one row per image.

    Args:
        sizes: width and height in pixels (N, 2); 0 if the image was not decoded.
        num_bytes: file size (N,).
        checksums: checksum of the file's bytes (N,) uint64.
        hashes: perceptual hash (N,) uint64.
        thumbnails: grey thumbnail (N, 16, 16) uint8.
        means: mean of each channel (N, 3), 0 to 255.
        squares: mean square of each channel (N, 3); exact only for images decoded at full size.
        ranges: lowest and highest value of images of 16 bits (N, 2); 0 and -1 for others.
    """

    sizes: np.ndarray
    num_bytes: np.ndarray
    checksums: np.ndarray
    hashes: np.ndarray
    thumbnails: np.ndarray
    means: np.ndarray
    squares: np.ndarray
    ranges: np.ndarray

    @classmethod
    def empty(cls, count: int) -> Self:
        return cls(
            sizes=np.zeros((count, 2), np.int32),
            num_bytes=np.zeros(count, np.int64),
            checksums=np.zeros(count, np.uint64),
            hashes=np.zeros(count, np.uint64),
            thumbnails=np.zeros((count, _SMALL_THUMBNAIL, _SMALL_THUMBNAIL), np.uint8),
            means=np.zeros((count, 3), np.float32),
            squares=np.zeros((count, 3), np.float32),
            ranges=np.tile(np.array([0, -1], np.int32), (count, 1)),
        )

    @property
    def decoded(self) -> np.ndarray:
        """Whether each image was decoded, (N,) bool."""
        return self.sizes[:, 0] > 0

    def fill(self, first: int, part: "Measurements") -> None:
        """Copy the rows of `part` into this table, starting at row `first`."""
        for name, values in vars(part).items():
            getattr(self, name)[first : first + len(values)] = values


class _Task(NamedTuple):
    first: int
    paths: list[str]
    full_size: np.ndarray


class _Result(NamedTuple):
    first: int
    findings: list[Finding]
    measurements: Measurements


def read_all(
    pool: Pool[Reader], paths: Sequence[str], full_size: np.ndarray, on_images: Callable[[int], None]
) -> tuple[Measurements, list[Finding]]:
    """Inspect every image.

    Args:
        full_size: which images to decode at full size, (N,) bool; others may be decoded at a reduced size.
        on_images: called with the number of images done since the last call.
    """
    measurements = Measurements.empty(len(paths))
    findings: list[Finding] = []
    chunks = (slice(first, first + _CHUNK) for first in range(0, len(paths), _CHUNK))
    tasks = (_Task(chunk.start, list(paths[chunk]), full_size[chunk]) for chunk in chunks)
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
    means, deviations = np.zeros((2, count, 3))
    for row, (path, full_size) in enumerate(zip(task.paths, task.full_size.tolist())):
        try:
            data = reader.source.read(task.first + row, path)
        except UnreadableImage as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.strerror:
                reason = cause.strerror.lower()
            else:
                # Without the path and the fix, which differ from the report's.
                reason = str(error).rpartition(": ")[2].partition(";")[0].partition(",")[0]
            findings.append(Finding("unreadable_file", path, reason))
            continue
        try:
            inspection = inspect(
                data,
                path,
                max_pixels=reader.max_pixels,
                full_size=full_size,
                messages=reader.messages,
                input_range=reader.input_range,
            )
        except Exception as error:
            # Decoders raise all sorts of errors on damaged files, which must not end the check.
            findings.append(Finding("undecodable", path, " ".join(str(error).split())))
            continue
        findings += [Finding(code, path, detail) for code, detail in inspection.findings]
        rows.num_bytes[row], rows.checksums[row] = inspection.num_bytes, inspection.checksum
        pixels = inspection.pixels
        if pixels is not None:
            rows.sizes[row] = pixels.width, pixels.height
            means[row], deviations[row] = pixels.means[:, 0], pixels.deviations[:, 0]
            thumbnails[row] = pixels.thumbnail
            if pixels.value_range is not None:
                rows.ranges[row] = pixels.value_range
    rows.means[:], rows.squares[:] = means, means**2 + deviations**2
    rows.hashes[:] = hash_thumbnails(thumbnails)
    # Averages of 2 x 2 pixels; slicing is ten times as fast as a sum over axes.
    parts = [thumbnails[:, i::2, j::2].astype(np.uint16) for i in (0, 1) for j in (0, 1)]
    rows.thumbnails[:] = sum(parts[1:], parts[0]) // 4
    return _Result(task.first, findings, rows)
