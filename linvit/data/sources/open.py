"""The forms that data may have, and which of them lies where a user points: folders, lists, tars, hub sets."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from linvit.data.sources.base import ImageSet, NoSuchSplit, split_names
from linvit.data.sources.classes import CLASS_FILE, MissingClasses, quoted
from linvit.data.sources.csv import open_list
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
    """Finds the images and labels of a split, whatever form they have.

    In a folder DATA a split is, the first that is there: the folder DATA/SPLIT with a folder per class or with tars,
    the list DATA/SPLIT.csv, or the tars DATA/SPLIT.tar, DATA/SPLIT-000.tar or DATA/NAME-SPLIT-000.tar and so on. A
    split may also be written as a file of DATA, or several: "list.csv", "part-{000..099}.tar", "part-*.tar". DATA
    itself may be a list with a column `split`, or hf:NAME of a Hugging Face set. Names of splits are as for
    `open_folder`.

    Args:
        data: folder, list or hf:NAME.
        split: name of the split, or of its files in the folder.
        class_names: labels are given by name from this list (from a run or another split), whatever is there.
        missing_classes: whether the split may lack classes of `class_names`.

    Raises:
        ValueError: naming the file and the mend, where there is no such split, or its images and labels are not as
            they should be; see `open_folder`, `open_list`, `open_shards` and `open_hub`.
    """
    text = os.fspath(data)
    if text.startswith(PREFIX):
        return open_hub(text, split=split, class_names=class_names, missing_classes=missing_classes)
    root = Path(data)
    if root.is_file():
        if root.suffix.lower() != ".csv":
            raise ValueError(f"{root}: is no CSV list; give the folder that it is in")
        return open_list(root, split=split, class_names=class_names, missing_classes=missing_classes)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; give the folder that holds the splits (train, val)")
    found = _find(root, split)
    if isinstance(found, list):
        return open_shards(
            found,
            split=split,
            class_file=root / CLASS_FILE,
            class_names=class_names,
            missing_classes=missing_classes,
        )
    if found.is_file():
        return open_list(found, split=split, class_names=class_names, missing_classes=missing_classes)
    return open_folder(root, split=split, class_names=class_names, missing_classes=missing_classes)


def _find(root: Path, split: str) -> Path | list[Path]:
    """A split's folder or list, or its tars in the order of their names."""
    if split.lower().endswith((".csv", ".tar")):
        return _find_files(root, split)
    tars = _tars_in(root)
    for name in split_names(split):
        folder, listing = root / name, root / f"{name}.csv"
        if folder.is_dir():
            return _tars_of(folder) or folder
        if listing.is_file():
            return listing
        if shards := [tar for tar in tars if _is_shard_of(name, tar)]:
            return shards
    here = sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
    found = f"it holds {quoted(here)}" if here else "it is empty"
    raise NoSuchSplit(f"{root}: no split '{split}' (looked for {', '.join(split_names(split))}); {found}")


def _tars_of(folder: Path) -> list[Path]:
    """The tars of a split's folder, unless it has folders, which are its classes then."""
    if class_folders(folder):
        return []
    compressed = sorted(path.name for path in folder.iterdir() if path.name.endswith(_COMPRESSED_TARS))
    if compressed:
        raise ValueError(
            f"{folder}: {quoted(compressed)} is compressed, so that no image can be read by itself; decompress it"
        )
    return _tars_in(folder)


def _tars_in(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() == ".tar" and path.name[0] != "." and path.is_file()
    )


def _is_shard_of(split: str, tar: Path) -> bool:
    # As in train.tar, train-000.tar, imagenet1k-train-0000.tar and train-00000-of-00100.tar.
    return re.fullmatch(rf"(.*[-_.])?{re.escape(split)}([-_.]?\d+([-_.]of[-_.]\d+)?)?", tar.stem) is not None


def _find_files(root: Path, pattern: str) -> Path | list[Path]:
    is_glob = any(sign in pattern for sign in "*?[")
    paths = [path for name in _expand(pattern) for path in (sorted(root.glob(name)) if is_glob else [root / name])]
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise ValueError(f"{root}: no file {quoted(missing or [pattern])}; name files of this folder")
    return paths[0] if pattern.lower().endswith(".csv") else paths


def _expand(pattern: str) -> list[str]:
    """The names that a range stands for, as in part-{000..099}.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    return [f"{pattern[: found.start()]}{number:0{len(first)}d}{pattern[found.end() :]}" for number in numbers]
