"""What lies where in a tar of images: found by reading its headers once.

The images in a set of tars as a few arrays, kept in the user's cache so that large sets are read through once.
"""

import hashlib
import json
import os
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from linvit.data.decode import EXTENSIONS
from linvit.data.sources.base import PackedStrings
from linvit.output.files import write_file

# Files that label the image of the same name; the first that is there counts, and .txt only outside of class folders.
LABEL_SUFFIXES = ("cls", "json", "txt")
# Longer ones hold other things.
_LONGEST_LABEL = 200
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512


class Member(NamedTuple):
    """An image in a tar: its name there, where its bytes begin and how many they are, and its label, if it has one."""

    name: str
    offset: int
    size: int
    label: str | None


@dataclass
class _Contents:
    """Files by their WebDataset key: folder and name up to the first dot."""

    images: dict[str, list[Member]] = field(default_factory=lambda: defaultdict(list))
    labels: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))


def scan_tar(path: Path) -> list[Member]:
    """The images of a tar in its order.

    Raises:
        ValueError: naming the tar, and the file in it, for a tar that is compressed, damaged or truncated, a file that
            is there twice, a link in place of an image, a label that cannot be read, or one without an image.
    """
    try:
        with path.open("rb") as file:
            _refuse_compressed(path, file)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                contents = _read_contents(path, file, tar)
                _refuse_more(file, tar.offset)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); restore or remove the tar") from error
    except tarfile.TarError as error:
        raise ValueError(f"{path}: is truncated, damaged or no tar ({error}); restore or remove it") from error
    return _pair(path, contents)


def _refuse_compressed(path: Path, file: BinaryIO) -> None:
    start = file.read(8)
    file.seek(0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(f"{path}: is compressed ({name}), so that no image can be read by itself; decompress it")


def _refuse_more(file: BinaryIO, end: int) -> None:
    """Raises ReadError unless zeros alone follow: tarfile takes damage, and the first of joined tars' ends, for it."""
    file.seek(end)
    rest = file.read(_BLOCK)
    if len(rest) < _BLOCK:
        raise tarfile.ReadError("its end is missing")
    while rest:
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"neither a header nor the end at byte {end:,}")
        rest = file.read(2**20)


def _read_contents(path: Path, file: BinaryIO, tar: tarfile.TarFile) -> _Contents:
    contents = _Contents()
    seen: set[str] = set()
    while (member := tar.next()) is not None:
        # tarfile would keep them all.
        tar.members.clear()  # type: ignore[attr-defined]
        member.name = member.name.removeprefix("./")
        folder, _, base = member.name.rpartition("/")
        if member.isdir() or any(part.startswith(".") for part in member.name.split("/")):
            continue
        stem, _, suffix = base.partition(".")
        is_image = base.lower().endswith(EXTENSIONS)
        if not is_image and suffix.lower() not in LABEL_SUFFIXES:
            continue
        if not member.isreg() or member.issparse():
            raise ValueError(
                f"{path}/{member.name}: is a link or sparse; pack the files themselves (tar --dereference)"
            )
        if member.name in seen:
            raise ValueError(f"{path}/{member.name}: is there twice; pack every file once")
        seen.add(member.name)
        key = f"{folder}/{stem}"
        if is_image:
            contents.images[key].append(Member(member.name, member.offset_data, member.size, None))
        elif (label := _read_label(path, file, member, suffix.lower())) is not None:
            contents.labels[key][suffix.lower()] = label
    return contents


def _read_label(path: Path, file: BinaryIO, member: tarfile.TarInfo, suffix: str) -> str | None:
    """What a file says the label is; None where it is about something else."""
    is_json = suffix == "json"
    if not is_json and member.size > _LONGEST_LABEL:
        return None
    file.seek(member.offset_data)
    try:
        text = file.read(member.size).decode().strip()
        label = json.loads(text).get("label") if is_json else text
    except (ValueError, AttributeError) as error:
        kind = "a JSON object" if is_json else "text"
        raise ValueError(f"{path}/{member.name}: is not {kind}; write the label there as UTF-8") from error
    if isinstance(label, str):
        return label if label and "\n" not in label else None
    return str(label) if isinstance(label, int) and not isinstance(label, bool) else None


def _pair(path: Path, contents: _Contents) -> list[Member]:
    members = []
    for key, labels in contents.labels.items():
        if "cls" in labels and key not in contents.images:
            raise ValueError(
                f"{path}/{key.lstrip('/')}.cls: is the label of no image (looked for {' '.join(EXTENSIONS)})"
            )
    for key, images in contents.images.items():
        labels = contents.labels.get(key, {})
        if labels:
            # NAME.jpg is the image that NAME.cls labels, and NAME.mask.png belongs to it.
            images = [image for image in images if image.name.rpartition("/")[2].count(".") == 1] or images
        if labels and len(images) > 1:
            raise ValueError(f"{path}/{images[1].name}: has the label file of {images[0].name}, too; keep one image")
        folder = key.rpartition("/")[0].rpartition("/")[2]
        own = labels.get("cls") or labels.get("json") or folder or labels.get("txt")
        members += [image._replace(label=own) for image in images]
    return sorted(members, key=lambda member: member.offset)


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
