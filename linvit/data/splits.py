"""The names under which a split is looked for."""

_TRAIN_NAMES = ("train", "training")
_VALIDATION_NAMES = ("val", "validation", "valid", "test")


class NoSuchSplit(ValueError):
    """Data without the split that is asked for; its message names those that there are."""


def split_names(split: str) -> tuple[str, ...]:
    """The name asked for, then those that mean the same: "train" and "training"; "val", "validation" and so on."""
    if split == "train":
        return _TRAIN_NAMES
    if split in ("val", "validation"):
        return (split, *(name for name in _VALIDATION_NAMES if name != split))
    return (split,)
