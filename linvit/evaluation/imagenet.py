"""ImageNet's names and lists, as timm ships them: lemmas of WordNet ids, ImageNet-A and -R, ReaL labels."""

import json
from functools import cache
from importlib.resources import files

from timm.data import ImageNetInfo

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
