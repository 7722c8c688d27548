"""Labels of ImageNet's validation images, which lie in one folder, in the text files that come with them.

val.txt, val_map.txt                             ILSVRC2012_val_00000001.JPEG 65      (a number from 0, or a name)
imagenet_2012_validation_synset_labels.txt       n01751748                            (a line per image, in order)
ILSVRC2012_validation_ground_truth.txt           490                                  (an ID; meta.mat names it)
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from linvit.data.decode import EXTENSIONS

# The official file, whose numbers are IDs of the development kit, not labels.
_OFFICIAL = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"


def read_ground_truth(file: Path, text: str, *, folders: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Line, path and label of each image in a list with a path and a label per line, or a label alone.

    Args:
        file: the list.
        text: its contents.
        folders: names of the folder beside the list that contains the images, if paths are missing.

    Raises:
        ValueError: for labels alone if their number is not that of the images; for the official file without meta.mat.
    """
    lines = [(number, line.rsplit(None, 1)) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if any(len(parts) > 1 for _, parts in lines):
        for number, parts in lines:
            if len(parts) < 2:
                raise ValueError(f"{file}: line {number}: has no label; write a path and a label")
            yield number, parts[0].strip(), parts[1]
        return
    name_of = _read_ids(file) if file.name == _OFFICIAL else None
    images = _images_beside(file, folders)
    if len(images) != len(lines):
        raise ValueError(
            f"{file}: has {len(lines):,} labels without paths, but there are {len(images):,} images; give a path and a "
            "label per line"
        )
    for image, (number, (label,)) in zip(images, lines):
        if name_of is not None and label not in name_of:
            raise ValueError(f"{file}: line {number}: {label} is not an ID in {_META}; restore the file")
        yield number, image, label if name_of is None else name_of[label]


def _images_beside(file: Path, folders: Sequence[str]) -> list[str]:
    """The images, sorted, in the first of the folders that exists beside a list."""
    folder = next((name for name in folders if (file.parent / name).is_dir()), None)
    if folder is None:
        raise ValueError(f"{file}: lists labels without paths, and there is no folder {' or '.join(folders)} beside it")
    names = os.listdir(file.parent / folder)
    return [os.path.join(folder, name) for name in sorted(names) if name.lower().endswith(EXTENSIONS)]


def _read_ids(file: Path) -> dict[str, str]:
    """The WordNet id of each ID of the development kit, from its meta.mat."""
    meta = file.parent / _META
    if not meta.is_file():
        raise ValueError(
            f"{file}: its numbers are IDs of ImageNet's development kit, not labels; copy the kit's {_META} beside it, "
            "or write a CSV list path,label"
        )
    from scipy.io import loadmat

    try:
        synsets = loadmat(meta, squeeze_me=True, variable_names=["synsets"])["synsets"]
        pairs = zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist())
        return {str(int(number)): str(name) for number, name in pairs}
    except Exception as error:
        # SciPy raises errors of many kinds for a damaged file.
        raise ValueError(f"{meta}: cannot be read ({error}); restore it") from error
