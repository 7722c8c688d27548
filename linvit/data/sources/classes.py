"""Class names and labels: which classes a split has and which label each gets, by the same rules for every source."""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from linvit.output.files import parse_json
from linvit.settings.fields import listed

MissingClasses = Literal["refuse", "allow"]

# Names numeric labels: one class name per line, from label 0, in the data folder.
CLASS_FILE = "classes.txt"


@dataclass(frozen=True)
class Classes:
    """The class name of every label, and the label of every name or number found with the images."""

    names: list[str]
    label_of: dict[str, int]
    # Tells the user where the names come from; empty if that is obvious.
    note: str = ""


def number_classes(
    found: Collection[str],
    *,
    source: str | os.PathLike[str],
    class_names: Sequence[str] | None,
    missing_classes: MissingClasses,
) -> Classes:
    """Assign labels to class names: in sorted order, as torchvision does, or in the order of `class_names`.

    Args:
        found: class names of the images.
        source: where they were found, for messages.
        class_names: class names of a run or another split, in label order; the images must not have others.
        missing_classes: whether classes of `class_names` may have no images.

    Raises:
        ValueError: for a class that is not in `class_names`, or one without images.
    """
    names = sorted(found) if class_names is None else list(class_names)
    unknown = sorted(set(found) - set(names))
    if unknown:
        are, them = ("is", "it") if len(unknown) == 1 else ("are", "them")
        raise ValueError(
            f"{source}: {quoted(unknown)} {are} not among the {len(names)} known classes; "
            f"rename or remove {them}, or train on data that includes {them}"
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
    """`number_classes` for labels that may be names or whole numbers.

    Numbers are line numbers of `class_file` if that exists, else indices into `class_names`, both from 0. Without
    either, or if `class_names` are numbers too, the numbers themselves are the class names.

    Args:
        class_file: text file with one class name per line; it need not exist.

    Raises:
        ValueError: for a negative number or one without a name, for a `class_file` that `read_class_map` refuses, and
            as `number_classes` does.
    """
    if not all(re.fullmatch(r"-?[0-9]+", label) for label in found):
        return number_classes(found, source=source, class_names=class_names, missing_classes=missing_classes)
    numbers = sorted(found, key=int)
    if int(numbers[0]) < 0:
        raise ValueError(f"{source}: label {numbers[0]} is not a class; remove the images without a label")
    name_of = {number: number for number in numbers}
    note = ""
    if class_file.is_file():
        lines = read_class_map(class_file, flag="")
        name_of = _look_up(numbers, lines, source=source, names_from=str(class_file))
        class_names = lines if class_names is None else class_names
        note = f"{source}: labels are numbers; {class_file} names them"
    elif class_names is None:
        class_names = numbers
        note = f"{source}: labels are numbers and serve as class names; write {class_file} to name the classes"
    elif not all(name.isdecimal() for name in class_names):
        name_of = _look_up(numbers, class_names, source=source, names_from="the list of classes")
        note = f"{source}: labels are numbers, read as indices into the list of classes, from 0"
    classes = number_classes(
        set(name_of.values()), source=source, class_names=class_names, missing_classes=missing_classes
    )
    return Classes(classes.names, {number: classes.label_of[name] for number, name in name_of.items()}, note)


def timm_order(names: Collection[str]) -> list[str]:
    """Class names in the order of timm's labels: numbers in names by value, and upper case like lower case."""
    from timm.utils.misc import natural_key

    try:
        return sorted(sorted(names), key=natural_key)
    except ValueError:
        # timm fails at names such as "²", so it has never numbered them.
        return sorted(names)


# The words that `--class-map` takes in place of a file: whose order the labels have.
CLASS_ORDERS: dict[str, Callable[[Collection[str]], list[str]]] = {"timm": timm_order, "torchvision": sorted}


def is_class_order(class_map: Path) -> bool:
    """Whether `--class-map` is one of the words in CLASS_ORDERS; a file of that name has precedence."""
    return str(class_map) in CLASS_ORDERS and not class_map.is_file()


def classes_in_order(class_map: Path, found: Collection[str]) -> list[str]:
    """Class names in label order: those in the file `class_map`, or the classes `found`, if it names an order.

    Raises ValueError as `read_class_map` does.
    """
    return CLASS_ORDERS[str(class_map)](found) if is_class_order(class_map) else read_class_map(class_map)


def order_conflict(names: Sequence[str]) -> str | None:
    """The difference if timm trained weights without class names; None if `names` are in timm's order as well.

    Names in an order of their own, neither timm's nor sorted, come from a list of classes and are taken at its word.
    """
    by_timm = timm_order(names)
    if list(names) != sorted(names) or by_timm == list(names):
        return None
    label = next(label for label, (own, other) in enumerate(zip(names, by_timm)) if own != other)
    return f"label {label} is {names[label]!r} in torchvision's order and {by_timm[label]!r} in timm's"


def read_class_map(path: str | os.PathLike[str], *, flag: str = "--class-map ") -> list[str]:
    """Read class names in label order: a text file with one name per line, or JSON.

    Messages begin with `flag`, which names the file.

    JSON is a list of names, {"name": label} as `class_to_idx` has it, {"label": "name"}, or {"label": ["id", "name"]}.

    Raises ValueError if the file cannot be read, is empty, repeats a name or leaves out a label.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"{flag}{path}: cannot be read ({error.strerror})") from error
    if Path(path).suffix.lower() == ".json":
        names = _names_in_json(text, source=f"{flag}{path}")
    elif "\0" in text:
        raise ValueError(f"{flag}{path}: is not text; write one class name per line")
    else:
        names = [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{flag}{path}: lists {quoted(repeated)} more than once; give every class its own name")
    if not names:
        raise ValueError(f"{flag}{path}: is empty; write one class name per line")
    return names


def _names_in_json(text: str, *, source: str) -> list[str]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{source}: is not valid JSON ({error})") from error
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    if isinstance(content, dict):
        pairs = [_name_and_label(*pair) for pair in content.items()]
        names = {label: name for name, label in pairs}
        if names and sorted(names) == list(range(len(pairs))) and None not in names.values():
            return [str(names[label]) for label in range(len(pairs))]
    raise ValueError(
        f'{source}: give each class a name and a label from 0 on, as in {{"cat": 0, "dog": 1}} or ["cat", "dog"]'
    )


def _name_and_label(key: str, value: Any) -> tuple[str | None, int]:
    """A class name and its label, whichever of the two is the key; (None, -1) for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return key, value
    name = value[0] if isinstance(value, list) and value else value
    return (name, int(key)) if key.isdecimal() and isinstance(name, str) else (None, -1)


def quoted(names: Sequence[str]) -> str:
    """The first five names in quotes, and how many more there are."""
    return listed([f"'{name}'" for name in names], most=5)


def _look_up(
    numbers: Sequence[str], names: Sequence[str], *, source: str | os.PathLike[str], names_from: str
) -> dict[str, str]:
    if int(numbers[-1]) >= len(names):
        raise ValueError(
            f"{source}: label {numbers[-1]} has no name, because {names_from} has only {len(names)} (labels 0 to "
            f"{len(names) - 1}); add the missing names or number the labels from 0"
        )
    return {number: names[int(number)] for number in numbers}
