"""A fingerprint of the images and labels of a run, so that a resumed run notices when they changed.

It covers the relative path and label of every image, and the file size of at most NUM_SIZES of them, evenly spread. The
folder of the images may move. A file replaced by another one of the same size is not noticed.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from linvit.data.decode import UnreadableImage
from linvit.data.sources.base import ImageSet
from linvit.data.sources.classes import quoted

NUM_SIZES = 1000
# Reported for an image that cannot be read.
_NO_SIZE = -1


def fingerprint(images: ImageSet) -> dict[str, Any]:
    """Plain values for the training state: digests of all images and of each class, and the sizes by path."""
    everything = blake2b(digest_size=16)
    classes = [blake2b(digest_size=16) for _ in images.class_names]
    for name, label in zip(images.relative_names(), images.labels):
        # A path cannot contain a zero byte.
        everything.update(b"%s\0%d\0" % (name, label))
        classes[label].update(name + b"\0")
    sample = np.unique(np.linspace(0, len(images) - 1, min(len(images), NUM_SIZES)).astype(int)).tolist()
    return {
        "all": everything.hexdigest(),
        "classes": [each.hexdigest() for each in classes],
        "sizes": [_size(images, index) for index in sample],
        "sample": sample,
    }


def _size(images: ImageSet, index: int) -> int:
    try:
        return images.num_bytes(index)
    except UnreadableImage:
        return _NO_SIZE


def changed_images(before: Mapping[str, Any], now: Mapping[str, Any], images: ImageSet) -> str | None:
    """The changes from one fingerprint to that of `images`, in words; None if they are equal."""
    if before["all"] != now["all"]:
        pairs = zip(images.class_names, before["classes"], now["classes"])
        others = [name for name, old, new in pairs if old != new]
        return f"the images of {quoted(others)} changed" if others else "the order of the images changed"
    differing = [
        str(images.path(index)) for index, old, new in zip(now["sample"], before["sizes"], now["sizes"]) if old != new
    ]
    return f"the contents of {quoted(differing)} changed" if differing else None


def changed_data(
    before: Mapping[str, Any] | None, now: Mapping[str, Any] | None, image_sets: Sequence[ImageSet]
) -> list[str]:
    """A sentence for each of the training and validation images that changed since a state was saved.

    Args:
        before: the fingerprints in the state by split name, or None for a state without any.
        now: those of `image_sets`, in the same order.
    """
    if before is None or now is None:
        return []
    changes = ((name, changed_images(before[name], now[name], images)) for name, images in zip(now, image_sets))
    return [f"{name} images: {change}" for name, change in changes if change is not None]
