"""Index of the images in tars: where each one starts, its size and its label, read once and cached."""

import hashlib
import json
import os
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from linvit.data.decode import EXTENSIONS
from linvit.data.sources.base import PackedStrings
from linvit.output.files import parse_json, reason, write_file
from linvit.output.terminal import progress_bar

# Extensions of label files, by priority. The name of the image's folder comes before .txt, which may be a caption.
LABEL_SUFFIXES = ("cls", "json", "txt")
FIRST_DOT = "WebDataset cuts names at their first dot"
# Longer .cls and .txt files are not labels.
_MAX_LABEL_BYTES = 200
_MAX_JSON_BYTES = 2**24
# Far more than long names and PAX records need.
_MAX_HEADER_BYTES = 2**20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512
# Version of the cached index; increase it whenever the same tars would be indexed differently.
_VERSION = 2
# Smaller sets are indexed again faster than a user would notice.
_MIN_CACHED = 10_000


@dataclass(frozen=True)
class ShardIndex:
    """The images of a list of tars, by tar and then in the order of the tar.

    Attributes:
        names: name of each image in its tar.
        shards: number of each image's tar, int32.
        offsets: where each image starts in its tar in bytes, int64.
        sizes: size of each image in bytes, int64.
        labels: the distinct labels.
        codes: index of each image's label in `labels`, int32; -1 if it has none.
    """

    names: PackedStrings
    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: list[str]
    codes: np.ndarray


class Member(NamedTuple):
    """An image in a tar: its name, the offset and size of its data in bytes, and its label, if it has one."""

    name: str
    offset: int
    size: int
    label: str | None


def index_shards(paths: Sequence[Path]) -> ShardIndex:
    """Index the images in these tars; raises ValueError as `scan_tar` does.

    A large index is cached in $XDG_CACHE_HOME/linvit (~/.cache/linvit) and reused until the size or modification time
    of a tar changes.
    """
    fingerprint = _fingerprint(paths)
    file = _cache_file(paths)
    index = None if file is None else _read_cached(file, fingerprint)
    if index is None:
        index = _scan(paths)
        if file is not None and len(index.names) >= _MIN_CACHED:
            _write_cached(file, index, fingerprint)
    return index


def scan_tar(path: Path) -> list[Member]:
    """The images in a tar, in its order.

    Raises:
        ValueError: naming the tar, and the file in it, for a tar that is compressed, damaged or truncated, a file that
            occurs twice, a link in place of an image, a label that cannot be read, or a label without an image.
    """
    try:
        with path.open("rb") as file:
            _refuse_compressed(path, file)
            with _open_tar(file) as tar:
                contents = _read_contents(path, file, tar)
                _check_end(file, tar.offset)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); restore or remove the tar") from error
    except tarfile.TarError as error:
        raise ValueError(f"{path}: is truncated, damaged or not a tar ({error}); restore or remove it") from error
    return _label_images(path, contents)


@dataclass
class _Contents:
    """Images and labels by their WebDataset key: the folder and the name up to its first dot."""

    images: dict[str, list[Member]] = field(default_factory=lambda: defaultdict(list))
    labels: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    # Names without extension of the .cls files that have a further dot, and so are no labels.
    dotted: set[str] = field(default_factory=set)


class _HeaderReader:
    """A tar's file as tarfile reads it; ReadError for a header that claims more bytes than headers have."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)


def _open_tar(file: BinaryIO) -> tarfile.TarFile:
    with _python_errors_as_damage():
        return tarfile.open(fileobj=cast(BinaryIO, _HeaderReader(file)), mode="r:")


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member of a tar; raises TarError if it is damaged."""
    with _python_errors_as_damage():
        member = tar.next()
    if member is not None and (member.size < 0 or tar.offset <= member.offset):
        # tarfile would read the same headers for ever.
        raise tarfile.ReadError(f"{member.name!r} has {member.size:,} bytes")
    return member


@contextmanager
def _python_errors_as_damage() -> Iterator[None]:
    """Turn Python's own errors, such as RecursionError for thousands of headers of one name, into ReadError."""
    try:
        yield
    except (OSError, tarfile.TarError):
        raise
    except Exception as error:
        raise tarfile.ReadError(f"a header cannot be parsed: {reason(error)}") from error


def _refuse_compressed(path: Path, file: BinaryIO) -> None:
    start = file.read(8)
    file.seek(0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(f"{path}: is compressed ({name}), which does not allow random access; decompress it")


def _check_end(file: BinaryIO, end: int) -> None:
    """Raise ReadError unless only zeros follow `end`.

    tarfile stops without an error at a damaged header, and at the end of the first of several concatenated tars.
    """
    file.seek(end)
    rest = file.read(_BLOCK)
    if len(rest) < _BLOCK:
        raise tarfile.ReadError("its end is missing")
    while rest:
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"neither a header nor the end at byte {end:,}")
        _skip_hole(file)
        rest = file.read(2**20)


def _skip_hole(file: BinaryIO) -> None:
    """Move to the next data of a sparse file, which may have terabytes of zeros that are not on the disk."""
    if not hasattr(os, "SEEK_DATA"):
        return
    try:
        file.seek(os.lseek(file.fileno(), file.tell(), os.SEEK_DATA))
    except OSError:
        # Only a hole follows.
        file.seek(0, os.SEEK_END)


def _read_contents(path: Path, file: BinaryIO, tar: tarfile.TarFile) -> _Contents:
    contents = _Contents()
    seen: set[str] = set()
    while (member := _next(tar)) is not None:
        # tarfile would otherwise keep every header in memory.
        tar.members.clear()  # type: ignore[attr-defined]
        member.name = member.name.removeprefix("./")
        folder, _, base = member.name.rpartition("/")
        if member.isdir() or any(part.startswith(".") for part in member.name.split("/")):
            continue
        stem, _, suffix = base.partition(".")
        is_image = base.lower().endswith(EXTENSIONS)
        if suffix.lower().endswith(".cls"):
            contents.dotted.add(member.name[: -len(".cls")])
        if not is_image and suffix.lower() not in LABEL_SUFFIXES:
            continue
        if not member.isreg() or member.issparse():
            raise ValueError(
                f"{path}/{member.name}: is a link or sparse; pack the files themselves (tar --dereference)"
            )
        if member.name in seen:
            raise ValueError(f"{path}/{member.name}: occurs twice; pack every file once")
        seen.add(member.name)
        key = f"{folder}/{stem}"
        if is_image:
            contents.images[key].append(Member(member.name, member.offset_data, member.size, None))
        elif (label := _read_label(path, file, member, suffix.lower())) is not None:
            contents.labels[key][suffix.lower()] = label
    return contents


def _read_label(path: Path, file: BinaryIO, member: tarfile.TarInfo, suffix: str) -> str | None:
    """The label in a file; None if the file contains something else."""
    is_json = suffix == "json"
    if not is_json and member.size > _MAX_LABEL_BYTES:
        return None
    if member.size > _MAX_JSON_BYTES:
        raise ValueError(f"{path}/{member.name}: has {member.size:,} bytes, too many for a label; remove it")
    file.seek(member.offset_data)
    try:
        text = file.read(member.size).decode().strip()
        label = parse_json(text).get("label") if is_json else text
    except (ValueError, AttributeError) as error:
        kind = "a JSON object" if is_json else "text"
        raise ValueError(f"{path}/{member.name}: is not {kind}; write the label there in UTF-8") from error
    if isinstance(label, str):
        return label if label and "\n" not in label else None
    return str(label) if isinstance(label, int) and not isinstance(label, bool) else None


def _label_images(path: Path, contents: _Contents) -> list[Member]:
    members = []
    for key, labels in contents.labels.items():
        if "cls" in labels and key not in contents.images:
            raise ValueError(
                f"{path}/{key.lstrip('/')}.cls: has no image beside it (looked for {' '.join(EXTENSIONS)}); add the "
                "image or remove the label"
            )
    for key, images in contents.images.items():
        labels = contents.labels.get(key, {})
        for image in images if not labels else ():
            if image.name.rpartition(".")[0] in contents.dotted:
                raise ValueError(f"{path}/{image.name}: its .cls file does not count, because {FIRST_DOT}; rename both")
        if labels:
            # Of NAME.jpg and NAME.mask.png, NAME.cls labels the first.
            images = [image for image in images if image.name.rpartition("/")[2].count(".") == 1] or images
        if labels and len(images) > 1:
            raise ValueError(
                f"{path}/{images[1].name}: shares a label file with {images[0].name}, because {FIRST_DOT}; rename the "
                "files, or keep one of the two images"
            )
        folder = key.rpartition("/")[0].rpartition("/")[2]
        label = labels.get("cls") or labels.get("json") or folder or labels.get("txt")
        members += [image._replace(label=label) for image in images]
    return sorted(members, key=lambda member: member.offset)


def _scan(paths: Sequence[Path]) -> ShardIndex:
    codes_of: dict[str, int] = {}
    names: list[str] = []
    parts: list[np.ndarray] = [np.empty((0, 4), np.int64)]
    with progress_bar() as progress:
        for number, path in enumerate(progress.track(paths, description="reading shards")):
            rows = []
            for member in scan_tar(path):
                code = -1 if member.label is None else codes_of.setdefault(member.label, len(codes_of))
                names.append(member.name)
                rows.append((number, member.offset, member.size, code))
            parts.append(np.array(rows, np.int64).reshape(-1, 4))
    shards, offsets, sizes, codes = np.concatenate(parts).T
    return ShardIndex(
        names=PackedStrings.pack(names),
        shards=shards.astype(np.int32),
        offsets=offsets.copy(),
        sizes=sizes.copy(),
        labels=list(codes_of),
        codes=codes.astype(np.int32),
    )


def _fingerprint(paths: Sequence[Path]) -> np.ndarray:
    """Version of the index, size and modification time of each tar, int64 (tars, 3)."""
    rows = []
    for path in paths:
        try:
            state = path.stat()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); restore or remove the tar") from error
        rows.append((_VERSION, state.st_size, state.st_mtime_ns))
    return np.array(rows, dtype=np.int64)


def _cache_file(paths: Sequence[Path]) -> Path | None:
    """The file that caches the index; None for a user without a home folder."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    names = "\0".join(os.path.abspath(path) for path in paths)
    digest = hashlib.sha256(os.fsencode(names)).hexdigest()
    return folder / "linvit" / "shards" / f"{digest[:32]}.npz"


def _read_cached(file: Path, fingerprint: np.ndarray) -> ShardIndex | None:
    """The cached index; None if there is none, or if it does not match the tars."""
    try:
        with np.load(file) as cached:
            if not np.array_equal(cached["stamp"], fingerprint):
                return None
            names = PackedStrings(cached["names"].tobytes(), cached["ends"])
            labels = json.loads(cached["labels"].tobytes())
            return ShardIndex(names, cached["shards"], cached["offsets"], cached["sizes"], labels, cached["codes"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _write_cached(file: Path, index: ShardIndex, fingerprint: np.ndarray) -> None:
    arrays = {
        "stamp": fingerprint,
        "names": np.frombuffer(index.names.block, np.uint8),
        "ends": index.names.ends,
        "labels": np.frombuffer(json.dumps(index.labels).encode(), np.uint8),
        **{name: getattr(index, name) for name in ("shards", "offsets", "sizes", "codes")},
    }
    # Processes that train together write at the same time, each to its own file.
    own = file.with_stem(f"{file.stem}-{os.getpid()}")
    # An index that cannot be cached is built again by the next run.
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(own, lambda target: np.savez(target, **arrays))
        own.replace(file)
