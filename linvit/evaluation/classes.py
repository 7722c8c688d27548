"""ImageNet's names and lists, as timm ships them: lemmas of WordNet ids, ImageNet-A and -R, ReaL labels.

Which of a model's classes each class of a data set is: by name, never by an order that nobody has checked.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from timm.data import ImageNetInfo

from linvit.settings.fields import listed, nearest

# Data sets of some of ImageNet's 1,000 classes: name and timm's file.
_SUBSETS = {"ImageNet-A": "imagenet_a_synsets.txt", "ImageNet-R": "imagenet_r_synsets.txt"}


@cache
def lemmas() -> dict[str, str]:
    """Names of the classes of ImageNet and its supersets: n01440764 → "tench, Tinca tinca"."""
    lines = _read("imagenet_synset_to_lemma.txt").splitlines()
    pairs = (line.replace('"', "").partition("\t") for line in lines)
    return {name: words for name, _, words in pairs}


def describe(name: str) -> str:
    """A class's name for people: "n01440764 tench", and whatever is no WordNet id as it is."""
    return f"{name} {in_words(name)}" if name in lemmas() else name


def in_words(name: str) -> str:
    """A class's name in a sentence: "tench" for n01440764, and whatever is no WordNet id as it is."""
    known = lemmas().get(name)
    return name if known is None else known.partition(",")[0]


@cache
def synsets() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in the order of the labels."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


def published_subset(names: set[str]) -> str | None:
    """The data set that has exactly these of ImageNet's classes: ImageNet-A or ImageNet-R; None for others."""
    return next((known for known, file in _SUBSETS.items() if set(_read(file).split()) == names), None)


@cache
def real_labels() -> list[list[int]]:
    """For each of the 50,000 validation images, by number, all labels that are right (Beyer et al. 2020)."""
    labels: list[list[int]] = json.loads(_read("imagenet_real_labels.json"))
    return labels


def _read(name: str) -> str:
    return (files("timm.data") / "_info" / name).read_text(encoding="utf-8")


ALLOW = "--allow-subset"

# What a class of the model may be looked up by, and what the data's is looked up by.
_Step = tuple[Callable[[str], list[str]], Callable[[str], list[str]]]


@dataclass(frozen=True)
class ClassMatch:
    """A data set's classes among a model's.

    Attributes:
        class_names: name of every class of the model.
        labels: the model's label for each class of the data set; None where the model does not know the class.
        how: what tied them together, for people: "by name".
        note: a sentence on what is not as usual, or None.
    """

    class_names: list[str]
    labels: tuple[int | None, ...]
    how: str
    note: str | None = None

    @property
    def present(self) -> list[int]:
        """Labels of the classes that the data set has, ascending."""
        return sorted(label for label in self.labels if label is not None)

    @property
    def is_subset(self) -> bool:
        """Whether the model has classes that the data set lacks."""
        return len(self.present) < len(self.class_names)


def match_classes(
    found: Sequence[str], known: Sequence[str] | None, *, num_classes: int, model: str, data: str, allow_subset: bool
) -> ClassMatch:
    """Find each class of a data set among a model's classes.

    Names may be the same, WordNet ids on one side and their lemmas on the other ("tench", "golden_retriever"), or
    numbers, as ImageNet-V2 names its folders.

    Args:
        found: the data set's classes.
        known: the model's classes, in the order of its logits; None where nothing tells them.
        num_classes: how many logits it has.
        model: what to call the model in messages.
        data: what to call the data set.
        allow_subset: whether classes may be missing on either side; ImageNet-A's and -R's are no surprise.

    Raises ValueError where a name fits several classes, two names fit one, nothing tells which is which, or a class is
    missing that may not be.
    """
    if known is None:
        return _without_names(found, num_classes=num_classes, model=model, data=data, allow_subset=allow_subset)
    how, labels = _best_match(found, known, data)
    if all(label is None for label in labels):
        raise ValueError(
            f"{data}: none of its classes ({listed(found, most=3)}) is one of {model}'s ({listed(known, most=3)})"
        )
    _refuse_twice(found, labels, known, data)
    note = "classes of the data are numbers, taken for labels from 0 on" if how == "by index" else None
    match = ClassMatch(list(known), labels, how, note)
    return _check(match, found, model=model, data=data, allow_subset=allow_subset)


def _without_names(found: Sequence[str], *, num_classes: int, model: str, data: str, allow_subset: bool) -> ClassMatch:
    unnamed = "the weights do not name their classes"
    if num_classes == len(synsets()) and set(found) <= set(synsets()):
        labels = tuple(synsets().index(name) for name in found)
        note = f"{unnamed}: they were taken for ImageNet's, in the order of the WordNet ids"
        match = ClassMatch(list(synsets()), labels, "by WordNet id", note)
        return _check(match, found, model=model, data=data, allow_subset=allow_subset)
    if len(found) != num_classes:
        raise ValueError(
            f"{model} has {num_classes} classes without names, but {data} holds {len(found)}; evaluate a run's folder, "
            "which knows its classes' names"
        )
    numbers = _numbers(found, num_classes)
    if None not in numbers:
        note = f"{unnamed}: those of the data are numbers, taken for labels from 0 on"
        match = ClassMatch(sorted(found, key=int), numbers, "by index", note)
        _refuse_twice(found, numbers, match.class_names, data)
        return match
    note = f"{unnamed}: folders, sorted by name, were taken for labels 0, 1, ..."
    return ClassMatch(list(found), tuple(range(num_classes)), "by order", note)


def _best_match(found: Sequence[str], known: Sequence[str], data: str) -> tuple[str, tuple[int | None, ...]]:
    """How most classes are found, the first way of equals, and their labels."""
    is_wordnet = all(name in lemmas() for name in known)
    ways = [("by WordNet id" if is_wordnet else "by name", _find(found, known, _EXACTLY, data))]
    if set(found) <= set(known):
        return ways[0]
    ways.append(("by lemma" if is_wordnet else "by names spelt alike", _find(found, known, _BY_LEMMA, data)))
    ways.append(("by index", _numbers(found, len(known))))
    return max(ways, key=lambda way: sum(label is not None for label in way[1]))


def _numbers(found: Sequence[str], num_classes: int) -> tuple[int | None, ...]:
    """Labels of folders that are all named by their label; else none."""
    if not all(name.isdecimal() and int(name) < num_classes for name in found):
        return (None,) * len(found)
    return tuple(map(int, found))


def _find(found: Sequence[str], known: Sequence[str], steps: Sequence[_Step], data: str) -> tuple[int | None, ...]:
    """The label of each class by the first step that knows it; ValueError where that is several."""
    tables = [(_labels_by(known, of_known), of_found) for of_known, of_found in steps]
    labels: list[int | None] = []
    for name in found:
        keyed = ((table, key) for table, of_found in tables for key in of_found(name))
        candidates = next((table[key] for table, key in keyed if key in table), set())
        if len(candidates) > 1:
            several = " or ".join(repr(describe(known[label])) for label in sorted(candidates))
            raise ValueError(f"{data}: the class {name!r} may be {several}; rename it to one of them")
        labels.append(next(iter(candidates), None))
    return tuple(labels)


def _labels_by(known: Sequence[str], keys: Callable[[str], list[str]]) -> dict[str, set[int]]:
    labels: dict[str, set[int]] = {}
    for label, name in enumerate(known):
        for key in keys(name):
            labels.setdefault(key, set()).add(label)
    return labels


def _itself(name: str) -> list[str]:
    return [name]


def _whole(name: str) -> list[str]:
    return [", ".join(_each(name))]


def _first(name: str) -> list[str]:
    return _each(name)[:1]


def _each(name: str) -> list[str]:
    """The lemmas of a class, spelt alike: those of a WordNet id, or those that the name lists."""
    return [lemma.strip().lower() for lemma in lemmas().get(name, name).replace("_", " ").split(",")]


_EXACTLY: list[_Step] = [(_itself, _itself)]
# All lemmas in one, the first alone, any: "missile" is class 657, and a lemma of "projectile, missile" too.
_BY_LEMMA: list[_Step] = [*_EXACTLY, (_whole, _whole), (_first, _first), (_each, _whole)]


def _refuse_twice(found: Sequence[str], labels: Sequence[int | None], known: Sequence[str], data: str) -> None:
    names: dict[int, str] = {}
    for name, label in zip(found, labels):
        if label is None:
            continue
        if label in names:
            raise ValueError(f"{data}: {names[label]!r} and {name!r} are both the class {known[label]!r}; merge them")
        names[label] = name


def _check(match: ClassMatch, found: Sequence[str], *, model: str, data: str, allow_subset: bool) -> ClassMatch:
    """The match with its note; ValueError where classes are missing that may not be."""
    strange = [name for name, label in zip(found, match.labels) if label is None]
    if strange and not allow_subset:
        close = nearest(strange[0], match.class_names)
        raise ValueError(
            f"{data}: {_quoted(strange)} {'is' if len(strange) == 1 else 'are'} not among the {len(match.class_names)} "
            f"classes of {model}{f' (is {strange[0]!r} {close!r}?)' if close else ''}; rename or remove the folder, or "
            f"give {ALLOW} to leave the images out"
        )
    present = set(match.present)
    missing = [name for label, name in enumerate(match.class_names) if label not in present]
    published = published_subset({match.class_names[label] for label in present}) if missing else None
    if missing and published is None and not allow_subset:
        raise ValueError(
            f"{data}: lacks {_quoted(missing)} of the {len(match.class_names)} classes of {model}; add images, or "
            f"give {ALLOW} to evaluate on the {len(present)} that are there"
        )
    notes = [match.note] if match.note is not None else []
    if missing:
        notes.append(f"{published or 'the data'} has {len(present)} of the model's {len(match.class_names)} classes")
    if strange:
        notes.append(f"images of {_quoted(strange)} were left out: the model does not know the class")
    return ClassMatch(match.class_names, match.labels, match.how, "; ".join(notes) or None)


def _quoted(names: Sequence[str]) -> str:
    return listed([repr(name) for name in names], most=5)
