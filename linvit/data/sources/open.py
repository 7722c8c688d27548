"""Open a split of DATA in whichever form it has: class folders, CSV list, tars or Hugging Face data set."""

import os
import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np

from linvit.data.sources.base import ImageSet, ImageSubset, NoSuchSplit, join_notes, split_names, split_note
from linvit.data.sources.classes import CLASS_FILE, MissingClasses, quoted
from linvit.data.sources.csv import LISTS, lists_of, open_list
from linvit.data.sources.folder import class_folders, open_folder
from linvit.data.sources.hub import PREFIX, open_hub
from linvit.data.sources.tar import open_shards

_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_images(
    data: str | os.PathLike[str],
    *,
    split: str,
    class_names: Sequence[str] | None = None,
    missing_classes: MissingClasses = "refuse",
) -> ImageSet:
    """Find the images and labels of a split, whatever their form.

    In a folder DATA, the split is the first of these that exists: the folder DATA/SPLIT, with class folders or with
    tars; the list DATA/SPLIT.csv, DATA/LOC_SPLIT_solution.csv and so on (see `lists_of`), whose images may lie in
    DATA/SPLIT; the tars DATA/SPLIT.tar, DATA/SPLIT-000.tar, DATA/NAME-SPLIT-000.tar and so on. A
    split may also name files of DATA: "list.csv", "part-{000..099}.tar", "part-*.tar". DATA itself may be a list with
    a column `split`, or hf:NAME for a Hugging Face data set. Splits have the same synonyms as in `open_folder`.

    Args:
        data: folder, list or hf:NAME.
        split: name of the split, or of its files in the folder.
        class_names: class names of a run or another split, in label order; the split must not have others.
        missing_classes: whether the split may lack classes of `class_names`.

    Raises:
        ValueError: naming the file and the fix, if the split does not exist or its images or labels are invalid; see
            `open_folder`, `open_list`, `open_shards` and `open_hub`.
    """
    text = os.fspath(data)
    if text.startswith(PREFIX):
        return open_hub(text, split=split, class_names=class_names, missing_classes=missing_classes)
    root = Path(data)
    if root.is_file():
        if root.suffix.lower() not in LISTS:
            raise ValueError(f"{root}: is not a list ({' '.join(LISTS)}); give the folder that contains it")
        return open_list(root, split=split, class_names=class_names, missing_classes=missing_classes)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; give the folder that contains the splits (train, val)")
    name, found = _find_split(root, split)
    if isinstance(found, list):
        shards = open_shards(
            found,
            split=split,
            class_file=root / CLASS_FILE,
            class_names=class_names,
            missing_classes=missing_classes,
        )
        shards.note = join_notes(split_note(root, split, name), shards.note)
        return shards
    if found.is_file():
        return open_list(found, split=split, class_names=class_names, missing_classes=missing_classes)
    return open_folder(root, split=split, class_names=class_names, missing_classes=missing_classes)


def paths_of_split(data: str | os.PathLike[str], split: str) -> list[Path]:
    """The folders and lists that `open_images` may read for a split; other files in a folder DATA are not read."""
    root = Path(data)
    if not root.is_dir():
        return [root]
    names = [name for each in split_names(split) for name in (each, *lists_of(each))]
    return [root / name for name in (*names, CLASS_FILE) if (root / name).exists()]


def open_fraction(
    data: str | os.PathLike[str],
    *,
    split: str,
    fraction: float,
    part: Literal["train", "val"],
    class_names: Sequence[str] | None = None,
) -> ImageSubset:
    """Split a set without validation images: a hash of its relative path decides to which part an image belongs.

    So an image stays in its part whatever is added or removed, and wherever the folder is.

    Args:
        data: as in `open_images`, or a folder of class folders, or a list of one split.
        split: name of the split to divide; all of `data` if it has no split of this name.
        fraction: expected share of the images in the part "val".
        part: which part to return.
        class_names: class names of a run or another split, in label order; the images must not have others.

    Raises:
        ValueError: if a class has no training images, or no image is in the part; and as `open_images` does.
    """
    try:
        images = open_images(data, split=split, class_names=class_names, missing_classes="allow")
    except NoSuchSplit:
        images = open_images(data, split=_whole(Path(data)), class_names=class_names, missing_classes="allow")
    is_val = np.array([_hash(name) < fraction for name in images.relative_names()])
    labels = np.asarray(images.labels)
    counts = np.bincount(labels[~is_val], minlength=len(images.class_names))
    lacking = [name for name, count in zip(images.class_names, counts) if not count]
    if lacking and part == "train":
        raise ValueError(f"{images.root}: val_fraction {fraction:g} leaves no training images of {quoted(lacking)}")
    indices = np.flatnonzero(is_val if part == "val" else ~is_val)
    if not len(indices):
        raise ValueError(
            f"{images.root}: val_fraction {fraction:g} selects none of the {len(images)} images; set it higher"
        )
    return ImageSubset(images, indices, split=part)


def _whole(data: Path) -> str:
    """The split that stands for all of the data: the list itself, the folder "images" of class folders, or DATA."""
    if data.is_file():
        return data.name
    is_inside = (data / "images").is_dir() and class_folders(data / "images")
    return "images" if is_inside else "."


def _hash(name: bytes) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little") / 2**64


def _find_split(root: Path, split: str) -> tuple[str, Path | list[Path]]:
    """The name of a split in the folder, and its folder, its list or its tars sorted by name."""
    if split.lower().endswith((*LISTS, ".tar")):
        return split, _find_files(root, split)
    tars = _tars_in(root)
    for name in split_names(split):
        folder = root / name
        if folder.is_dir():
            return name, _tars_in_split(folder) or _list_of_flat(folder) or folder
        listing = next((path for path in _lists(root, name) if path.suffix != ".txt"), None)
        if listing is not None:
            return name, listing
        if shards := [tar for tar in tars if _is_shard_of(name, tar)]:
            return name, shards
    entries = sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
    found = f"found {quoted(entries)}" if entries else "the folder is empty"
    raise NoSuchSplit(f"{root}: no split '{split}' (looked for {', '.join(split_names(split))}); {found}")


def _list_of_flat(folder: Path) -> Path | None:
    """The list beside the folder of a split that contains no class folders; None if there are some, or no list."""
    return None if class_folders(folder) else next(_lists(folder.parent, folder.name), None)


def _lists(root: Path, split: str) -> Iterator[Path]:
    return (root / name for name in lists_of(split) if (root / name).is_file())


def _tars_in_split(folder: Path) -> list[Path]:
    """The tars in the folder of a split; none if it contains folders, since those are the classes."""
    if class_folders(folder):
        return []
    compressed = sorted(path.name for path in folder.iterdir() if path.name.endswith(_COMPRESSED_TARS))
    if compressed:
        raise ValueError(f"{folder}: compressed tars do not allow random access; decompress {quoted(compressed)}")
    return _tars_in(folder)


def _tars_in(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() == ".tar" and path.name[0] != "." and path.is_file()
    )


def _is_shard_of(split: str, tar: Path) -> bool:
    # Matches train.tar, train-000.tar, imagenet1k-train-0000.tar and train-00000-of-00100.tar.
    return re.fullmatch(rf"(.*[-_.])?{re.escape(split)}([-_.]?\d+([-_.]of[-_.]\d+)?)?", tar.stem) is not None


def _find_files(root: Path, pattern: str) -> Path | list[Path]:
    is_glob = any(sign in pattern for sign in "*?[")
    names = _expand_range(pattern)
    paths = [path for name in names for path in (sorted(root.glob(name)) if is_glob else [root / name])]
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise ValueError(f"{root}: no file {quoted(missing or [pattern])}; name files in this folder")
    return paths[0] if pattern.lower().endswith(LISTS) else paths


def _expand_range(pattern: str) -> list[str]:
    """The names in a range such as part-{000..099}.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    return [f"{pattern[: found.start()]}{number:0{len(first)}d}{pattern[found.end() :]}" for number in numbers]
