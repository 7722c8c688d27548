"""Names of the files of each image in a folder of maps."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from linvit.output.files import printable
from linvit.settings.process import UsageError

# Most file systems allow names of 255 bytes; extensions need some.
_LONGEST = 200
# The files of an image a are a.png, a.values.png and so on, and another image may be called a.values.
_PARTS = ("", ".values", ".heads")


class FileNames:
    """A name for the files of each image: its own without the extension, numbered where that is in use."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}
        self._taken: set[str] = set()

    def name(self, path: Path) -> str:
        """The name for the next image."""
        stem = printable(path.stem).encode()[:_LONGEST].decode(errors="ignore")
        number = self._count.get(stem, 0) + 1
        name = stem if number == 1 else f"{stem}-{number}"
        # An image may be called a-2 itself.
        while not self._taken.isdisjoint(name + part for part in _PARTS):
            number += 1
            name = f"{stem}-{number}"
        self._count[stem] = number
        self._taken.update(name + part for part in _PARTS)
        return name


def check_maps(flag: str, folder: Path, images: Iterable[Path], *, extensions: Sequence[str]) -> None:
    """Raise UsageError if the files of a map, NAME + extension in `folder`, would replace one of the images."""
    target = os.path.realpath(folder)
    real_folders: dict[str, str] = {}
    written, inside = set(), []
    names = FileNames()
    for image in images:
        name = names.name(image)
        written |= {name + extension for extension in extensions}
        parent = os.path.dirname(image)
        if parent not in real_folders:
            real_folders[parent] = os.path.realpath(parent)
        if real_folders[parent] == target:
            inside.append(image)
    for image in inside:
        if image.name in written:
            raise UsageError(f"{flag} {folder}: a map would replace the image {image}; choose another folder")
