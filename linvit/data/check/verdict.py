"""Whether training would start on DATA, found by opening it as training does."""

import os

from linvit.data.sources import open_images


def try_training(data: str | os.PathLike[str]) -> str:
    """What training says when it opens its splits, "" where it finds nothing wrong."""
    try:
        classes = open_images(data, split="train").class_names
        open_images(data, split="val", class_names=classes)
    except (ValueError, OSError) as error:
        return str(error)
    return ""
