"""A hook of mkdocs: files outside docs/ that pages link to become part of the site.

A page links to `../linvit/reference.py`, which is right in the repository. In the site the file is a copy under
`files/`: Markdown as a page, images and JSON as they are, other text as .txt, which every browser shows.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_SHOWN = {".md", ".json", ".png"}


def _target(page: str, link: str) -> str:
    """The path in the repository of a link on the page with this path in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _place(path: str) -> str:
    """Where a file or folder of the repository is in the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "files/repository.md"  # mkdocs takes README.md for an index
    # mkdocs leaves out names that begin with a dot.
    return f"files/{path.lstrip('.')}" + ("" if Path(path).suffix in _SHOWN else ".txt")


def _path(place: str) -> str:
    """The inverse of `_place` for pages."""
    if place == "files/repository.md":
        return "README.md"
    return place.removeprefix("files/") if place.startswith("files/") else f"docs/{place}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file that a page links to, and the files that those link to."""
    pages = [_path(file.src_uri) for file in files.documentation_pages()]
    while pages:
        page = pages.pop()
        for link, _ in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            path = _target(page, link)
            source, place = ROOT / path, _place(path)
            if files.get_file_from_path(place) is not None or not source.exists():
                continue
            if source.is_dir():
                names = sorted(each.name + "/" * each.is_dir() for each in source.iterdir() if each.name[0] not in "._")
                files.append(File.generated(config, place, content="\n".join([f"{path}/", "", *names, ""])))
                continue
            files.append(File.generated(config, place, abs_src_path=str(source)))
            if source.suffix == ".md":
                pages.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the places of their targets in the site."""
    here = page.file.src_uri

    def point(match: re.Match[str]) -> str:
        place = _place(_target(_path(here), match[1]))
        return f"]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{match[2] or ''})"

    return _LINK.sub(point, markdown)
