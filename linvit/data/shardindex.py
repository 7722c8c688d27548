"""The images in a set of tars as a few arrays, kept in the user's cache so that large sets are read through once."""

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from linvit.data.strings import PackedStrings
from linvit.data.tarindex import scan_tar
from linvit.files import write_file

# Part of what a kept index is checked against; raised whenever an index would be another.
_VERSION = 1
# Fewer images are found again more quickly than a user would notice.
_FEWEST_KEPT = 10_000


@dataclass(frozen=True)
class ShardIndex:
    """Images by shard and, within one, in its order.

    Attributes:
        names: of the images in their shards.
        shards: number of each image's shard, int32.
        offsets: where each image begins in its shard, int64.
        sizes: bytes of each image, int64.
        labels: what images are labelled with, each once.
        codes: place of each image's label in `labels`, int32; -1 where it has none.
    """

    names: PackedStrings
    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: list[str]
    codes: np.ndarray


def index_shards(paths: Sequence[Path]) -> ShardIndex:
    """The images in these tars; raises ValueError as `scan_tar` does.

    A large index is kept in $XDG_CACHE_HOME/linvit (~/.cache/linvit) and taken from there as long as the size and the
    time of change of every tar stay the same.
    """
    stamp = _stamp(paths)
    file = _cache_file(paths)
    index = _read(file, stamp)
    if index is None:
        index = _scan(paths)
        if len(index.names) >= _FEWEST_KEPT:
            _keep(file, index, stamp)
    return index


def _scan(paths: Sequence[Path]) -> ShardIndex:
    places: dict[str, int] = {}
    names: list[str] = []
    parts: list[np.ndarray] = [np.empty((0, 4), np.int64)]
    shown = track(
        paths,
        description="reading shards",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    for number, path in enumerate(shown):
        rows = []
        for member in scan_tar(path):
            code = -1 if member.label is None else places.setdefault(member.label, len(places))
            names.append(member.name)
            rows.append((number, member.offset, member.size, code))
        parts.append(np.array(rows, np.int64).reshape(-1, 4))
    shards, offsets, sizes, codes = np.concatenate(parts).T
    return ShardIndex(
        names=PackedStrings.pack(names),
        shards=shards.astype(np.int32),
        offsets=offsets.copy(),
        sizes=sizes.copy(),
        labels=list(places),
        codes=codes.astype(np.int32),
    )


def _stamp(paths: Sequence[Path]) -> np.ndarray:
    states = []
    for path in paths:
        try:
            state = path.stat()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); restore or remove the tar") from error
        states.append((_VERSION, state.st_size, state.st_mtime_ns))
    return np.array(states, dtype=np.int64)


def _cache_file(paths: Sequence[Path]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    names = "\0".join(os.path.abspath(path) for path in paths)
    digest = hashlib.sha256(os.fsencode(names)).hexdigest()
    return folder / "linvit" / "shards" / f"{digest[:32]}.npz"


def _read(file: Path, stamp: np.ndarray) -> ShardIndex | None:
    """The index kept in a file, if there is one and it is of these very tars."""
    try:
        with np.load(file) as kept:
            if not np.array_equal(kept["stamp"], stamp):
                return None
            names = PackedStrings(kept["names"].tobytes(), kept["ends"])
            labels = json.loads(kept["labels"].tobytes())
            return ShardIndex(names, kept["shards"], kept["offsets"], kept["sizes"], labels, kept["codes"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _keep(file: Path, index: ShardIndex, stamp: np.ndarray) -> None:
    arrays = {
        "stamp": stamp,
        "names": np.frombuffer(index.names.block, np.uint8),
        "ends": index.names.ends,
        "labels": np.frombuffer(json.dumps(index.labels).encode(), np.uint8),
        **{name: getattr(index, name) for name in ("shards", "offsets", "sizes", "codes")},
    }
    # Under a name of its own, since processes that train together write it at the same time.
    own = file.with_stem(f"{file.stem}-{os.getpid()}")
    # Where it cannot be kept, the next run reads the shards again.
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(own, lambda target: np.savez(target, **arrays))
        own.replace(file)
