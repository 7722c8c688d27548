"""Folders that attack a search, for tests."""

from pathlib import Path


def link_levels(top: Path, *, levels: int) -> None:
    """A folder with two links to a folder that has two links to a folder, and so on; the last one holds x.jpg."""
    folders = [top, *(top.with_name(f".level{level}") for level in range(levels))]
    for folder, below in zip(folders, [*folders[1:], None]):
        folder.mkdir(parents=True)
        for name in ("a", "b") if below else ():
            (folder / name).symlink_to(below, target_is_directory=True)
    (folders[-1] / "x.jpg").touch()
