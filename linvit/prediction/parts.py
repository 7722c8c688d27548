"""Predictions in parts: a folder with a file for each block of images, written by any number of processes.

_manifest.json     what the parts depend on (`linvit.prediction.identity`), their files and images, whether all exist
part-00000.csv     predictions of the first `part_size` images, in order; the next part continues with the next image
.lock              locked by the run that writes

The parts, one after another, are the rows that one process writes to one file. A part gets its name when it is
complete, so a run that was killed is run again and writes only the parts that are missing, with any number of
processes. Programs that read a folder of Parquet files ignore names that begin with `_` or `.`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from linvit.output.files import parse_json, reason, remove_leftovers, target_of, write_json, writing
from linvit.prediction.identity import Identity
from linvit.prediction.writers import lock
from linvit.settings.flags import UsageError, check_file, check_folder
from linvit.version import __version__

Format = Literal["csv", "jsonl", "parquet"]
MANIFEST = "_manifest.json"
LOCK = ".lock"
# By default, parts have at most this many images, and each process at least this many parts.
MOST_IMAGES, FEWEST_PARTS = 1024, 8


class _Manifest(BaseModel):
    """The entries of a manifest that are read."""

    model_config = ConfigDict(frozen=True)

    identity: Identity
    format: Format
    part_size: int


@dataclass(frozen=True)
class Parts:
    """Parts in one folder, or in two: predictions of images, and those of their tiles.

    Attributes:
        part_size: images per part; the last may have fewer.
        missing: parts that are not complete in all folders, ascending.
    """

    folders: tuple[Path, ...]
    identity: Identity
    format: Format
    part_size: int
    missing: tuple[int, ...] = ()

    def __len__(self) -> int:
        # One without rows, if there are no images: readers find the columns in it.
        return max(math.ceil(self.identity.images.count / self.part_size), 1)

    def images(self, part: int) -> range:
        """Indices of the images of a part."""
        return range(part * self.part_size, min((part + 1) * self.part_size, self.identity.images.count))

    def files(self, part: int) -> list[Path]:
        """The files of a part, one in each folder."""
        digits = max(len(str(len(self) - 1)), 5)
        return [folder / f"part-{part:0{digits}}.{self.format}" for folder in self.folders]

    def share(self, rank: int, world_size: int) -> tuple[int, ...]:
        """The missing parts that a process writes."""
        return self.missing[rank::world_size]

    def absent(self, parts: Sequence[int]) -> list[int]:
        """Those of the parts that lack a file."""
        return [part for part in parts if not all(file.is_file() for file in self.files(part))]

    def write_manifests(self, *, is_complete: bool) -> None:
        """Write the manifest of each folder; raises OSError if it cannot be written."""
        for number, folder in enumerate(self.folders):
            parts = [
                {"file": self.files(part)[number].name, "first": self.images(part).start, "images": len(images)}
                for part, images in ((part, self.images(part)) for part in range(len(self)))
            ]
            values: dict[str, Any] = {
                "linvit": __version__,
                "identity": self.identity.model_dump(),
                "format": self.format,
                "part_size": self.part_size,
                "complete": is_complete,
                "num_parts": len(parts),
                "parts": parts,
            }
            write_json(folder / MANIFEST, values)


def default_part_size(num_images: int, *, world_size: int, batch_size: int) -> int:
    """Images per part: several parts for each process, each of full batches, as one process has them."""
    share = math.ceil(num_images / (world_size * FEWEST_PARTS))
    batches = min(math.ceil(share / batch_size), MOST_IMAGES // batch_size)
    return max(batches, 1) * batch_size


def check_parts_folders(*folders: tuple[str, Path | None]) -> None:
    """Raise UsageError unless each folder can be created, is empty, or has parts.

    Each is a pair of its flag and its path; None is skipped.
    """
    flags: dict[Path, str] = {}
    for flag, folder in folders:
        if folder is None:
            continue
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{flag} {folder} is a file without an extension; give a folder, or a name in .csv")
        check_folder(flag, folder)
        if flags.setdefault(target_of(folder), flag) != flag:
            raise UsageError(f"{flags[target_of(folder)]} and {flag} are both {folder}; choose two folders")
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        # A run that was killed at its start leaves hidden files only.
        if MANIFEST not in names and not all(name.startswith(".") for name in names):
            raise UsageError(f"{flag} {folder} holds other files than predictions; choose a new or empty folder")
        if folder.is_dir():
            check_file(flag, folder / MANIFEST)


@contextmanager
def open_parts(
    folders: Sequence[Path], identity: Identity, *, format: Format | None, part_size: int | None, default_size: int
) -> Iterator[Parts]:
    """Create the folders and their manifests, or check those that exist; the folders are locked until the end.

    Args:
        format: by default that of the existing parts, else CSV.
        part_size: by default that of the existing parts, else `default_size`.

    Raises UsageError if the parts belong to other images, weights or options, or if another process is writing them.
    """
    files = []
    try:
        for folder in folders:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                files.append((folder / LOCK).open("ab"))
            try:
                lock(files[-1])
            except OSError:
                raise UsageError(f"{folder}: another process is writing parts in it; wait for it or stop it") from None
            remove_leftovers(folder)
        before = [_read(folder / MANIFEST) for folder in folders]
        known = next(filter(None, before), None)
        parts = Parts(
            tuple(folders),
            identity,
            format or (known.format if known else "csv"),
            part_size or (known.part_size if known else default_size),
        )
        for folder, manifest in zip(folders, before):
            if manifest is not None and (changes := _changes(manifest, parts)):
                raise UsageError(
                    f"{folder} holds parts of another run ({'; '.join(changes)}); choose another folder, or delete it "
                    "to start over"
                )
        missing = tuple(parts.absent(range(len(parts))))
        parts = replace(parts, missing=missing)
        if missing or None in before:
            parts.write_manifests(is_complete=False)
        yield parts
    finally:
        for file in files:
            file.close()


def _changes(before: _Manifest, now: Parts) -> list[str]:
    """What differs between the parts in a folder and those to be written, in words."""
    found = before.identity.changes(now.identity)
    if before.part_size != now.part_size:
        found.append(f"part size {before.part_size}, now {now.part_size}")
    if before.format != now.format:
        found.append(f"format {before.format}, now {now.format}")
    return found


def _read(path: Path) -> _Manifest | None:
    """The manifest of a folder; None if there is none."""
    if not path.exists():
        return None
    try:
        return _Manifest.model_validate(parse_json(path.read_bytes()))
    except ValidationError:
        problem = "it is not a manifest of parts"
    except (OSError, ValueError) as error:
        problem = reason(error)
    raise UsageError(f"{path} cannot be read ({problem}); restore it, or delete the folder to start over")
