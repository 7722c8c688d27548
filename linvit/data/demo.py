"""Image sets built as folders from installed packages: `linvit data elpv DIR`. Nothing is downloaded.

`elpv`: 2,624 electroluminescence photographs of solar cells (Deitsch et al. 2019, Buerhop-Lutz et al. 2018), in four
classes: mono- or polycrystalline, functional or defective.
"""

import hashlib
import importlib.util
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from linvit.output.files import write_json
from linvit.settings.flags import parse_options

SUMMARY = "build an image set as folders, from an installed package"

README = "README.txt"
ELPV_NOTE = """\
Solar cells in electroluminescence (PyPI elpv-dataset), as folders SPLIT/CLASS/IMAGE.

The images are licensed under CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/): name the authors,
not for commercial use, share alike. Cite:
  Deitsch et al., "Automatic classification of defective photovoltaic module cells in electroluminescence images",
  Solar Energy 185, 2019, pp. 455-468, doi:10.1016/j.solener.2019.02.067
  Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence
  Imagery", European PV Solar Energy Conference (EU PVSEC), 2018, doi:10.4229/35thEUPVSEC20182018-5CV.3.15

Changed here: sorted into classes (defective from a defect probability of 2/3 on) and split by a hash of each file
(train 80 %, val 20 %); the files themselves are unchanged.
"""


class SetOptions(BaseModel):
    """Which set to build, and where."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["elpv"] = Field(description="the set: elpv, photographs of solar cells")
    folder: Path = Field(description="folder to build it in: new, empty, or this very set from before")
    json_file: Path | None = Field(None, description="file that the counts are written to (default: none)")


@dataclass(frozen=True)
class ImageSet:
    """What a set consists of: its files by their place SPLIT/CLASS/NAME, and what was left out."""

    files: dict[str, Path]
    note: str
    num_copies: int
    num_contradictions: int

    def counts(self) -> dict[str, dict[str, int]]:
        """Images per class and split."""
        found = Counter(tuple(place.split("/")[:2]) for place in self.files)
        classes = sorted({class_name for _, class_name in found})
        return {name: {split: found[split, name] for split in ("train", "val")} for name in classes}


def main(argv: Sequence[str]) -> int:
    """Build the set, and return the exit status."""
    return build_set(
        parse_options(
            SetOptions,
            argv,
            prog="linvit data",
            description="Build an image set as folders SPLIT/CLASS/IMAGE, from an installed package.",
            positionals={"name": "SET", "folder": "DIR"},
            spellings={"json_file": ["--json"]},
        )
    )


def build_set(options: SetOptions) -> int:
    """Build the set, or find it there already, and print what it holds."""
    images = _SETS[options.name]()
    is_new = write_set(images, options.folder)
    print(images.note)
    print(f"{options.folder}: {'built' if is_new else 'already there, left as it was'}")
    _print_counts(images)
    if options.json_file is not None:
        report = {
            "folder": str(options.folder),
            "classes": images.counts(),
            "num_copies_dropped": images.num_copies,
            "num_contradictions_dropped": images.num_contradictions,
        }
        write_json(options.json_file, report)
    return 0


def _print_counts(images: ImageSet) -> None:
    counts = images.counts()
    print(f"{'class':<16}{'train':>8}{'val':>8}")
    for name, splits in counts.items():
        print(f"{name:<16}{splits['train']:>8,}{splits['val']:>8,}")
    train, val = (sum(splits[split] for splits in counts.values()) for split in ("train", "val"))
    print(f"{'all':<16}{train:>8,}{val:>8,}")
    print(
        f"left out: {images.num_copies} byte-identical copies, {images.num_contradictions} copies whose labels differ"
    )


def write_set(images: ImageSet, folder: Path) -> bool:
    """Copy a set's files into `folder`; False where they are there already.

    The folder appears whole or not at all. Raises ValueError where it holds anything else, which is left untouched.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _refuse_other_files(images, folder)
        return False
    target = folder.resolve()
    scratch = target.with_name(f".{target.name}.part")
    # Left over from a build that was killed.
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        for place, source in images.files.items():
            (scratch / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, scratch / place)
        (scratch / README).write_text(images.note, encoding="utf-8")
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    except OSError as error:
        raise OSError(f"{folder} cannot be built: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _refuse_other_files(images: ImageSet, folder: Path) -> None:
    mend = "give a new or empty folder, or delete this one"
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: {mend}")
    there = {path.relative_to(folder).as_posix() for path in _visible_files(folder)}
    expected = {*images.files, README}
    if strangers := sorted(there - expected):
        raise ValueError(f"{folder} holds other files, such as {strangers[0]}: {mend}")
    if missing := sorted(expected - there):
        raise ValueError(f"{folder} holds only a part of the set, {missing[0]} is missing: {mend}")
    for place, source in images.files.items():
        if _digest(folder / place) != _digest(source):
            raise ValueError(f"{folder} holds another {place} than the set: {mend}")


def _visible_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            yield path


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


def find_elpv() -> ImageSet:
    """The solar cells in the installed package elpv-dataset; raises ValueError where it is missing or incomplete."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError('the package elpv-dataset is not installed: run pip install "linvit[demo]"')
    return read_elpv(Path(spec.submodule_search_locations[0]) / "data")


def read_elpv(source: Path) -> ImageSet:
    """The set in a folder with `labels.csv` (file, defect probability, mono or poly) and the images it names.

    A file belongs to val if the first 32 bits of its SHA-1 are divisible by five, so that a split never changes.
    Of byte-identical files the first is kept, and none if their labels differ.
    """
    labels = source / "labels.csv"
    copies: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for number, line in enumerate(labels.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            name, probability, kind = line.split()
            class_name = f"{kind}_{'defective' if float(probability) > 0.5 else 'functional'}"
        except ValueError:
            raise ValueError(f"{labels}: line {number} is not `file probability type`: {line!r}") from None
        if kind not in ("mono", "poly"):
            raise ValueError(f"{labels}: line {number} has the type {kind!r}, which is neither mono nor poly")
        path = source / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: install elpv-dataset again")
        copies[_digest(path)].append((path, class_name))

    files: dict[str, Path] = {}
    num_copies = num_contradictions = 0
    for digest, group in copies.items():
        path, class_name = group[0]
        if len({class_name for _, class_name in group}) > 1:
            num_contradictions += len(group)
            continue
        split = "val" if int(digest[:8], 16) % 5 == 0 else "train"
        files[f"{split}/{class_name}/{path.name}"] = path
        num_copies += len(group) - 1
    return ImageSet(files, ELPV_NOTE, num_copies=num_copies, num_contradictions=num_contradictions)


_SETS: dict[str, Callable[[], ImageSet]] = {"elpv": find_elpv}
