"""Images that cannot be read and are left out: told after each epoch, and kept in the run's bad_images.txt."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist

from linvit.files import write_text
from linvit.validation import listed


class BadImages:
    """Collects them over an epoch and all processes.

    Args:
        file: one path a line, sorted, each once; written where there is any.
        is_primary: whether this process writes.
        say: tells a line.
    """

    def __init__(self, file: Path, *, is_primary: bool, say: Callable[[str], None]) -> None:
        self.file, self.is_primary, self.say = file, is_primary, say
        self._found: set[str] = set()

    def add(self, paths: Iterable[Path]) -> None:
        self._found |= {str(path) for path in paths}

    def end_epoch(self) -> None:
        """Tell what was left out in the epoch, and add it to the file; every process calls it."""
        found = [self._found]
        if dist.is_initialized():
            found = [set()] * dist.get_world_size()
            dist.all_gather_object(found, self._found)
        names = sorted(set().union(*found))
        self._found = set()
        if not names:
            return
        images = "1 image" if len(names) == 1 else f"{len(names):,} images"
        self.say(f"left out {images} that cannot be read: {listed(names)} ({self.file})")
        if self.is_primary:
            before = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
            write_text(self.file, "".join(f"{name}\n" for name in sorted({*before, *names})))
