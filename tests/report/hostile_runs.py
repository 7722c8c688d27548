"""Tiny runs on lists whose class names try to break out of a page."""

import csv
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tiny_runs import make_images, train

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "\"'&amp; {{ 7*7 }}",
    "=1+1\nnew line",
    "plain",
    "e",
]


def make_hostile_list(folder: Path, *, val: int = 3) -> Path:
    """Write DATA/train.csv and DATA/val.csv with images of the classes HOSTILE."""
    folders = [f"class{number}" for number in range(len(HOSTILE))]
    make_images(folder / "images", classes=tuple(folders), train=4, val=val)
    for split in ("train", "val"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label"])
            for name, label in zip(folders, HOSTILE):
                paths = sorted((folder / "images" / split / name).iterdir())
                writer.writerows([path.relative_to(folder), label] for path in paths)
    return folder


def train_run(data: Path, output: Path, name: str = "run", **settings: Any) -> Path:
    """Train two epochs with a moving average; returns the run's folder."""
    fixed = {"lr": 3e-3, "model_ema": True, "model_ema_decay": 0.5, "hflip": 0.5}
    assert train(data, output, name, **{**fixed, **settings}) == 0
    return output / name


class Page(HTMLParser):
    """The parts of a page: text outside of scripts, the elements, the scripts by their id (the program's is None)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self.text = ""
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts[dict(attrs).get("id")] = ""
            self._id = dict(attrs).get("id")
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside == ["script"]:
            self.scripts[self._id] += data
        elif not self._inside:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]
