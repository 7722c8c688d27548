"""The command `linvit data`: build a demo data set as folders from an installed package. It downloads nothing.

`elpv`: 2,624 electroluminescence photographs of solar cells (Deitsch et al. 2019, Buerhop-Lutz et al. 2018), in four
classes: monocrystalline or polycrystalline, functional or defective.
"""

import hashlib
import importlib.util
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from linvit.output.files import scratch_of, write_json
from linvit.settings.flags import check_files, check_folder, parse_options

if TYPE_CHECKING:
    from rich.console import Console

SUMMARY = "build a demo data set as folders from an installed package"

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


class DemoOptions(BaseModel):
    """Data set to build, and its folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["elpv"] = Field(description="data set: 'elpv', photographs of solar cells")
    folder: Path = Field(description="folder to build it in: new, empty, or with an earlier build of the same data set")
    json_file: Path | None = Field(None, description="write the number of images per class to this JSON file")


@dataclass(frozen=True)
class DemoSet:
    """The files of a data set, by their target SPLIT/CLASS/NAME, a note for the user, and the number of files left out.

    `num_copies` files are byte-identical copies; `num_contradictions` are copies whose labels differ.
    """

    files: dict[str, Path]
    note: str
    num_copies: int
    num_contradictions: int

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of images per class and split."""
        found = Counter(tuple(target.split("/")[:2]) for target in self.files)
        classes = sorted({class_name for _, class_name in found})
        return {name: {split: found[split, name] for split in ("train", "val")} for name in classes}


def main(argv: Sequence[str]) -> int:
    """Build the data set and return the exit status."""
    options = parse_options(
        DemoOptions,
        argv,
        prog="linvit data",
        description="Build a demo data set as folders SPLIT/CLASS/IMAGE from an installed package.",
        positionals={"name": "SET", "folder": "DIR"},
        spellings={"json_file": ["--json"]},
    )
    from linvit.output.terminal import page, show_line

    check_files(("--json", options.json_file))
    check_folder("DIR", options.folder)
    demo_set = DEMO_SETS[options.name]()
    is_new = write_demo_set(demo_set, options.folder)
    if options.json_file is not None:
        report = {
            "folder": str(options.folder),
            "classes": demo_set.counts(),
            "num_copies_dropped": demo_set.num_copies,
            "num_contradictions_dropped": demo_set.num_contradictions,
        }
        write_json(options.json_file, report)
    console = page(outputs=[options.json_file])
    for line in demo_set.note.splitlines():
        show_line(console, line)
    show_line(console, f"{options.folder}: {'built' if is_new else 'already built, not changed'}")
    _show_counts(console, demo_set)
    return 0


def _show_counts(console: "Console", demo_set: DemoSet) -> None:
    from linvit.output.terminal import show_line, table

    counts = demo_set.counts()
    totals = {split: sum(splits[split] for splits in counts.values()) for split in ("train", "val")}
    made = table(["class", "train", "val"], text=["class"])
    for name, splits in {**counts, "all": totals}.items():
        made.add_row(name, f"{splits['train']:,}", f"{splits['val']:,}")
    console.print(made)
    show_line(
        console,
        f"left out: {demo_set.num_copies} byte-identical copies, "
        f"{demo_set.num_contradictions} copies with contradictory labels",
    )


def write_demo_set(demo_set: DemoSet, folder: Path) -> bool:
    """Copy the files of a data set to `folder`; False if they are already there.

    The folder is complete or absent, even after an error.

    Raises:
        ValueError: if the folder contains anything else, which is then left unchanged.
        OSError: if the folder cannot be written.
    """
    target = folder.resolve()
    try:
        with _one_at_a_time(target.parent):
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                _check_files(demo_set, folder)
                return False
            _build(demo_set, target)
            return True
    except OSError as error:
        raise OSError(f"{folder} cannot be built: {error.strerror or error}; nothing was left behind") from error


def _build(demo_set: DemoSet, target: Path) -> None:
    scratch = scratch_of(target)
    # Remove what a killed build left.
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        for place, source in demo_set.files.items():
            (scratch / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, scratch / place)
        (scratch / README).write_text(demo_set.note, encoding="utf-8")
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _one_at_a_time(parent: Path) -> Iterator[None]:
    """Wait until no other build in this folder is running, and make later ones wait."""
    parent.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(parent, os.O_RDONLY)
    try:
        # Some network file systems have no such locks.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _check_files(demo_set: DemoSet, folder: Path) -> None:
    """Raise ValueError unless the folder contains exactly this data set."""
    remedy = "give a new or empty folder, or delete this one"
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: {remedy}")
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    expected = {*demo_set.files, README}
    if unexpected := sorted(found - expected):
        raise ValueError(f"{folder} contains other files, such as {unexpected[0]}: {remedy}")
    if missing := sorted(expected - found):
        raise ValueError(f"{folder} is incomplete, {missing[0]} is missing: {remedy}")
    for place, source in demo_set.files.items():
        if _digest(folder / place) != _digest(source):
            raise ValueError(f"{folder} contains a different {place}: {remedy}")


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


def find_elpv() -> DemoSet:
    """The solar cells in the installed package elpv-dataset.

    Raises:
        ValueError: if the package is not installed or incomplete.
    """
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError('the package elpv-dataset is not installed: run pip install "linvit[demo]"')
    return read_elpv(Path(spec.submodule_search_locations[0]) / "data")


def read_elpv(source: Path) -> DemoSet:
    """Read a folder with `labels.csv` (file, defect probability, mono or poly) and the images that it names.

    A file belongs to val if the first 32 bits of its SHA-1 are divisible by five, so its split never changes. Of
    byte-identical files the first is kept, or none if their labels differ.

    Raises:
        ValueError: for a line that cannot be parsed, or an image that is missing.
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
            raise ValueError(f"{labels}: line {number} has the type {kind!r}, which is neither 'mono' nor 'poly'")
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
    return DemoSet(files, ELPV_NOTE, num_copies=num_copies, num_contradictions=num_contradictions)


DEMO_SETS: dict[str, Callable[[], DemoSet]] = {"elpv": find_elpv}
