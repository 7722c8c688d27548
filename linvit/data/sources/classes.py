"""Which classes a split has, what they are called and which label each has: the same rules for every source."""

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from linvit.settings.fields import listed

MissingClasses = Literal["refuse", "allow"]

# Names the classes whose labels are numbers, a line each, from 0 on; lies in the folder of the data.
CLASS_FILE = "classes.txt"


@dataclass(frozen=True)
class Classes:
    """Name of every label, and the label of everything that images were found to be labelled with."""

    names: list[str]
    label_of: dict[str, int]
    # What a user should know about where the names come from.
    note: str = ""


def number_classes(
    found: Collection[str],
    *,
    source: str | os.PathLike[str],
    class_names: Sequence[str] | None,
    missing_classes: MissingClasses,
) -> Classes:
    """Classes whose names are known: sorted as torchvision sorts them, or in the order of `class_names`.

    Args:
        found: the names that images are labelled with.
        source: where, for messages.
        class_names: labels are given by name from this list (from a run or another split), whatever is found.
        missing_classes: whether classes of `class_names` may be without images.

    Raises:
        ValueError: for a class that `class_names` does not have, or one that is missing.
    """
    names = sorted(found) if class_names is None else list(class_names)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise ValueError(
            f"{source}: {quoted(unknown)} is not among the {len(names)} known classes; "
            "rename or remove it, or train on data that has the class"
        )
    absent = sorted(set(names) - set(found))
    if absent and missing_classes == "refuse":
        raise ValueError(f"{source}: no images of {quoted(absent)}; every split needs images of every class")
    return Classes(names, {name: label for label, name in enumerate(names)})


def number_labels(
    found: Collection[str],
    *,
    source: str | os.PathLike[str],
    class_names: Sequence[str] | None,
    missing_classes: MissingClasses,
    class_file: Path,
) -> Classes:
    """`number_classes` for labels that may also be whole numbers, which need names.

    They are lines of `class_file`, if there is one, else places in `class_names`, both from 0 on. Without either, or
    where `class_names` are numbers themselves, they are names as they stand.
    """
    if not all(re.fullmatch(r"-?[0-9]+", label) for label in found):
        return number_classes(found, source=source, class_names=class_names, missing_classes=missing_classes)
    numbers = sorted(found, key=int)
    if int(numbers[0]) < 0:
        raise ValueError(f"{source}: label {numbers[0]} is no class; leave out the images that have no label")
    name_of = {number: number for number in numbers}
    note = ""
    if class_file.is_file():
        lines = read_class_map(class_file)
        name_of = _look_up(numbers, lines, source=source, names_from=str(class_file))
        class_names = lines if class_names is None else class_names
        note = f"{source}: labels are numbers, named by {class_file}"
    elif class_names is None:
        class_names = numbers
        note = f"{source}: labels are numbers, and so are the names of the classes; {class_file} could name them"
    elif not all(name.isdecimal() for name in class_names):
        name_of = _look_up(numbers, class_names, source=source, names_from="the list of classes")
        note = f"{source}: labels are numbers, taken as places in the list of classes, from 0 on"
    classes = number_classes(
        set(name_of.values()), source=source, class_names=class_names, missing_classes=missing_classes
    )
    return Classes(classes.names, {number: classes.label_of[name] for number, name in name_of.items()}, note)


def read_class_map(path: str | os.PathLike[str]) -> list[str]:
    """Reads a text file with one class name a line, in the order of the labels."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"class_map {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"class_map {path}: is not a UTF-8 text file with one class name a line") from error
    names = [line.strip() for line in lines if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"class_map {path}: names {quoted(twice)} more than once")
    if not names:
        raise ValueError(f"class_map {path}: is empty; write one class name a line")
    return names


def quoted(names: Sequence[str]) -> str:
    """The first names in quotes, and how many more there are."""
    return listed([f"'{name}'" for name in names], most=5)


def _look_up(
    numbers: Sequence[str], names: Sequence[str], *, source: str | os.PathLike[str], names_from: str
) -> dict[str, str]:
    if int(numbers[-1]) >= len(names):
        raise ValueError(
            f"{source}: label {numbers[-1]} has no name, since {names_from} has {len(names)}, for 0 to "
            f"{len(names) - 1}; add the missing names or number the labels from 0 on"
        )
    return {number: names[int(number)] for number in numbers}
