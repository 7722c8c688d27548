"""Match the classes of a data set with those of a model: by name, WordNet id, lemma or number.

Includes the ImageNet lists that timm ships: lemmas of the WordNet ids, classes of ImageNet-A and -R, ReaL labels.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from timm.data import ImageNetInfo

from linvit.data.sources.classes import order_conflict
from linvit.settings.fields import listed, nearest

# Data sets with some of ImageNet's 1,000 classes: their names and timm's files.
_SUBSETS = {"ImageNet-A": "imagenet_a_synsets.txt", "ImageNet-R": "imagenet_r_synsets.txt"}


@dataclass(frozen=True)
class ClassMatch:
    """The classes of a data set matched with those of a model.

    Attributes:
        class_names: names of the model's classes, in the order of its logits.
        labels: the model's label for each class of the data set; None if the model does not know the class.
        how: how the classes were matched, for people: "by name".
        note: what a user should know about the match, or None.
    """

    class_names: list[str]
    labels: tuple[int | None, ...]
    how: str
    note: str | None = None

    @property
    def present(self) -> list[int]:
        """Labels of the classes that the data set has, in ascending order."""
        return sorted(label for label in self.labels if label is not None)

    @property
    def is_subset(self) -> bool:
        """Whether the model has classes that the data set lacks."""
        return len(self.present) < len(self.class_names)


def match_classes(
    data_classes: Sequence[str],
    model_classes: Sequence[str] | None,
    *,
    num_classes: int,
    model: str,
    data: str,
    allow_subset: bool,
) -> ClassMatch:
    """Find the model's label for each class of a data set.

    Classes match by equal names, by a WordNet id on one side and its lemma on the other ("tench", "golden_retriever"),
    or by number, as in the folders of ImageNet-V2.

    Args:
        data_classes: names of the data set's classes.
        model_classes: names of the model's classes in the order of its logits; None if they are unknown.
        num_classes: number of the model's logits.
        model: name of the model in messages.
        data: name of the data set in messages.
        allow_subset: allow classes that only one side has. ImageNet-A and -R need no permission.

    Raises ValueError if a name matches several classes, two names match the same class, the names of the model's
    classes are needed but unknown, or a class is missing without permission.
    """
    if model_classes is None:
        return _match_unnamed(data_classes, num_classes=num_classes, model=model, data=data, allow_subset=allow_subset)
    how, labels = _best_match(data_classes, model_classes, data)
    if all(label is None for label in labels):
        raise ValueError(
            f"{data}: none of its classes ({listed(data_classes, most=3)}) is a class of {model} "
            f"({listed(model_classes, most=3)}); rename the classes or choose another model"
        )
    _refuse_duplicates(data_classes, labels, model_classes, data)
    note = "the data's classes are numbers and were used as labels, counted from 0" if how == "by index" else None
    match = ClassMatch(list(model_classes), labels, how, note)
    return _check(match, data_classes, model=model, data=data, allow_subset=allow_subset)


@cache
def lemmas() -> dict[str, str]:
    """Names of the classes of ImageNet and its supersets: n01440764 → "tench, Tinca tinca"."""
    lines = _read("imagenet_synset_to_lemma.txt").splitlines()
    pairs = (line.replace('"', "").partition("\t") for line in lines)
    return {name: words for name, _, words in pairs}


def with_lemma(name: str) -> str:
    """A WordNet id with its first lemma, as "n01440764 tench"; other class names are returned unchanged."""
    return f"{name} {first_lemma(name)}" if name in lemmas() else name


def first_lemma(name: str) -> str:
    """The first lemma of a WordNet id: "tench" for n01440764; other class names are returned unchanged."""
    known = lemmas().get(name)
    return name if known is None else known.partition(",")[0]


def short_names(class_names: Sequence[str]) -> list[str]:
    """First lemmas of WordNet ids, with the id where two classes share one, as ImageNet's two cranes do."""
    lemmas_of = list(map(first_lemma, class_names))
    count = Counter(lemmas_of)
    return [with_lemma(name) if count[lemma] > 1 else lemma for name, lemma in zip(class_names, lemmas_of)]


@cache
def synsets() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in the order of the labels."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


def published_subset(names: set[str]) -> str | None:
    """The name, "ImageNet-A" or "ImageNet-R", if these are exactly the classes of one, else None."""
    return next((known for known, file in _SUBSETS.items() if set(_read(file).split()) == names), None)


@cache
def real_labels() -> list[list[int]]:
    """All correct labels of each of the 50,000 validation images, in the order of their numbers (Beyer et al. 2020)."""
    labels: list[list[int]] = json.loads(_read("imagenet_real_labels.json"))
    return labels


def _read(name: str) -> str:
    return (files("timm.data") / "_info" / name).read_text(encoding="utf-8")


def _match_unnamed(
    data_classes: Sequence[str], *, num_classes: int, model: str, data: str, allow_subset: bool
) -> ClassMatch:
    """Match classes with a model that has no class names."""
    unnamed = "the weights contain no class names"
    if num_classes == len(synsets()) and set(data_classes) <= set(synsets()):
        labels = tuple(synsets().index(name) for name in data_classes)
        note = f"{unnamed}: assumed ImageNet's classes in the order of their WordNet ids"
        match = ClassMatch(list(synsets()), labels, "by WordNet id", note)
        return _check(match, data_classes, model=model, data=data, allow_subset=allow_subset)
    if len(data_classes) != num_classes:
        raise ValueError(
            f"{model} has {num_classes} unnamed classes, but {data} has {len(data_classes)}; evaluate a run's folder, "
            "which contains the class names"
        )
    numbers = _numbers(data_classes, num_classes)
    if None not in numbers:
        note = f"{unnamed}: the data's classes are numbers and were used as labels, counted from 0"
        match = ClassMatch(sorted(data_classes, key=int), numbers, "by index", note)
        _refuse_duplicates(data_classes, numbers, match.class_names, data)
        return match
    if conflict := order_conflict(data_classes):
        raise ValueError(
            f"{model} has no class names, and the order of the classes of {data} is ambiguous: {conflict}; use "
            "--class-map timm if timm trained the weights, --class-map torchvision for labels in sorted order, or "
            "--class-map FILE with a class name per line"
        )
    note = f"{unnamed}: the data's classes, in their order, were used as labels 0, 1, ..."
    return ClassMatch(list(data_classes), tuple(range(num_classes)), "by order", note)


def _best_match(
    data_classes: Sequence[str], model_classes: Sequence[str], data: str
) -> tuple[str, tuple[int | None, ...]]:
    """The method that matches most classes, the first of equals, and its labels."""
    is_wordnet = all(name in lemmas() for name in model_classes)
    exact = _find(data_classes, model_classes, _EXACT, data)
    methods = [("by WordNet id" if is_wordnet else "by name", exact)]
    if set(data_classes) <= set(model_classes):
        return methods[0]
    by_lemma = _find(data_classes, model_classes, _BY_LEMMA, data)
    methods.append(("by lemma" if is_wordnet else "by names spelt alike", by_lemma))
    methods.append(("by index", _numbers(data_classes, len(model_classes))))
    return max(methods, key=lambda method: sum(label is not None for label in method[1]))


def _numbers(data_classes: Sequence[str], num_classes: int) -> tuple[int | None, ...]:
    """The labels if all classes are named by their label, else None for each."""
    if not all(name.isdecimal() and int(name) < num_classes for name in data_classes):
        return (None,) * len(data_classes)
    return tuple(map(int, data_classes))


# The keys under which a model's class is stored, and the keys under which a class of the data is looked up.
_Lookup = tuple[Callable[[str], list[str]], Callable[[str], list[str]]]


def _find(
    data_classes: Sequence[str], model_classes: Sequence[str], lookups: Sequence[_Lookup], data: str
) -> tuple[int | None, ...]:
    """The label of each class by the first lookup that has it; ValueError if that gives several."""
    tables = [(_labels_by_key(model_classes, model_keys), data_keys) for model_keys, data_keys in lookups]
    labels: list[int | None] = []
    for name in data_classes:
        keys = ((table, key) for table, data_keys in tables for key in data_keys(name))
        candidates = next((table[key] for table, key in keys if key in table), set())
        if len(candidates) > 1:
            several = " or ".join(repr(with_lemma(model_classes[label])) for label in sorted(candidates))
            raise ValueError(f"{data}: the class {name!r} may be {several}; rename it to one of them")
        labels.append(next(iter(candidates), None))
    return tuple(labels)


def _labels_by_key(model_classes: Sequence[str], keys_of: Callable[[str], list[str]]) -> dict[str, set[int]]:
    labels: dict[str, set[int]] = {}
    for label, name in enumerate(model_classes):
        for key in keys_of(name):
            labels.setdefault(key, set()).add(label)
    return labels


def _exact(name: str) -> list[str]:
    return [name]


def _all_lemmas(name: str) -> list[str]:
    return [", ".join(_each_lemma(name))]


def _first_lemma(name: str) -> list[str]:
    return _each_lemma(name)[:1]


def _each_lemma(name: str) -> list[str]:
    """The lemmas of a WordNet id, or the names listed in another class name; lower case, with spaces for `_`."""
    return [lemma.strip().lower() for lemma in lemmas().get(name, name).replace("_", " ").split(",")]


_EXACT: list[_Lookup] = [(_exact, _exact)]
# All lemmas joined, then the first alone, then any: "missile" is class 657, and also a lemma of "projectile, missile".
_BY_LEMMA: list[_Lookup] = [
    *_EXACT,
    (_all_lemmas, _all_lemmas),
    (_first_lemma, _first_lemma),
    (_each_lemma, _all_lemmas),
]


def _refuse_duplicates(
    data_classes: Sequence[str], labels: Sequence[int | None], model_classes: Sequence[str], data: str
) -> None:
    names: dict[int, str] = {}
    for name, label in zip(data_classes, labels):
        if label is None:
            continue
        if label in names:
            raise ValueError(
                f"{data}: {names[label]!r} and {name!r} both match the class {model_classes[label]!r}; merge them"
            )
        names[label] = name


def _check(match: ClassMatch, data_classes: Sequence[str], *, model: str, data: str, allow_subset: bool) -> ClassMatch:
    """The match with its notes; ValueError if classes are missing without permission."""
    unknown = [name for name, label in zip(data_classes, match.labels) if label is None]
    if unknown and not allow_subset:
        close = nearest(unknown[0], match.class_names)
        raise ValueError(
            f"{data}: {_quoted(unknown)} {'is' if len(unknown) == 1 else 'are'} not among the {len(match.class_names)} "
            f"classes of {model}{f' (is {unknown[0]!r} {close!r}?)' if close else ''}; rename or remove the folder, or "
            "use --allow-subset to skip the images"
        )
    present = set(match.present)
    missing = [name for label, name in enumerate(match.class_names) if label not in present]
    published = published_subset({match.class_names[label] for label in present}) if missing else None
    if missing and published is None and not allow_subset:
        raise ValueError(
            f"{data}: lacks {_quoted(missing)} of the {len(match.class_names)} classes of {model}; add images, or "
            f"use --allow-subset to evaluate on the {len(present)} that are present"
        )
    notes = [match.note] if match.note is not None else []
    if missing:
        notes.append(f"{published or 'the data'} has {len(present)} of the model's {len(match.class_names)} classes")
    if unknown:
        notes.append(f"skipped the images of {_quoted(unknown)}, which the model does not know")
    return ClassMatch(match.class_names, match.labels, match.how, "; ".join(notes) or None)


def _quoted(names: Sequence[str]) -> str:
    return listed([repr(name) for name in names], most=5)
