"""What is wrong with the classes of a listing: empty, in one split only, spelt alike, of very different sizes."""

from collections import defaultdict
from collections.abc import Mapping

from linvit.data.check.faults import LARGEST_IMBALANCE, Finding
from linvit.data.check.tree import Listing
from linvit.data.splits import split_names


def check_classes(listing: Listing) -> list[Finding]:
    """Findings about classes; splits without any, such as images without labels to predict on, are left alone."""
    splits = {split: counts for split, counts in listing.classes.items() if counts}
    return [*_empty(splits), *_in_some_splits(splits), *_spelt_alike(splits), *_imbalanced(splits)]


def training_split(listing: Listing) -> str:
    """The split that training takes, or the only or first one."""
    names = list(listing.classes)
    return next((name for name in split_names("train") if name in names), names[0])


def _empty(splits: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    return [
        Finding("empty_class", _place(split, name))
        for split, counts in splits.items()
        for name, count in counts.items()
        if count == 0
    ]


def _in_some_splits(splits: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    found = []
    for name in sorted(set().union(*splits.values())):
        having = [split for split, counts in splits.items() if name in counts]
        lacking = [split for split in splits if split not in having]
        if lacking:
            detail = f"not in {', '.join(lacking)}"
            found.append(Finding("class_in_one_split", _place(having[0], name), detail))
    return found


def _spelt_alike(splits: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    spellings: dict[str, dict[str, str]] = defaultdict(dict)
    for split, counts in splits.items():
        for name in counts:
            spellings[name.lower()].setdefault(name, _place(split, name))
    groups = [list(places.values()) for places in spellings.values() if len(places) > 1]
    return [Finding("class_case", first, "", tuple(rest)) for first, *rest in groups]


def _imbalanced(splits: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    found = []
    for split, counts in splits.items():
        filled = {name: count for name, count in counts.items() if count}
        if not filled:
            continue
        largest, smallest = max(filled, key=filled.__getitem__), min(filled, key=filled.__getitem__)
        if filled[largest] > LARGEST_IMBALANCE * filled[smallest]:
            detail = f"{filled[largest]:,} images of {largest}, {filled[smallest]:,} of {smallest}"
            found.append(Finding("class_imbalance", split or ".", detail))
    return found


def _place(split: str, name: str) -> str:
    return f"{split}/{name}" if split else name
