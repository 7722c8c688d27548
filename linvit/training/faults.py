"""Images that cannot be read and are left out: told after each epoch, and kept in the run's bad_images.txt.

Updates that are refused because loss or gradients are not finite: told, counted, after a row the end of the run.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from linvit.output.files import write_text
from linvit.settings.fields import listed
from linvit.training.state import Progress
from linvit.training.step import Update


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


class NonFiniteLossError(ValueError):
    """Loss or gradients were not finite in too many updates in a row; no weight has been touched by them."""


class BadSteps:
    """Watches the updates of a run.

    Args:
        most_in_row: refused updates in a row after which the run ends.
        path_of: from the index of an image to its file.
        say: tells a line.
    """

    def __init__(self, most_in_row: int, *, path_of: Callable[[int], Path], say: Callable[[str], None]) -> None:
        self.most_in_row, self.path_of, self.say = most_in_row, path_of, say
        # Indices of the images of each batch of the group.
        self._group: list[Tensor] = []
        # Where the row of refused updates began.
        self._row_start: Progress | None = None

    def add_batch(self, indices: Tensor) -> None:
        """Take note of a batch that the next update is of."""
        self._group.append(indices)

    def check(self, update: Update, progress: Progress, *, group_start: int, save: Callable[[Progress], None]) -> None:
        """Count an update in `progress`, and tell what was wrong with it.

        Args:
            progress: after the update.
            group_start: the first batch of its group.
            save: keeps the run's state with a progress.

        Raises NonFiniteLossError in all processes after too many refused updates in a row, with a state saved of when
        the row began.
        """
        group, self._group = self._group, []
        for note in update.notes:
            self.say(note)
        if update.outcome == "taken":
            progress.bad_in_row, self._row_start = 0, None
        if update.outcome != "refused":
            return
        if self._row_start is None:
            self._row_start = replace(progress, batch=group_start, bad_in_row=0, summary=list(progress.summary))
        progress.num_bad += 1
        progress.bad_in_row += 1
        where = f"epoch {progress.epoch}, batch {group_start}"
        what = _describe(update)
        files = [[str(self.path_of(index)) for index in batch.tolist()] for batch in group]
        suspects = listed(_suspects(files, update.bad_batches))
        self.say(f"refused an update ({where}): {what}; its images: {suspects}")
        if progress.bad_in_row >= self.most_in_row:
            save(self._row_start)
            raise NonFiniteLossError(
                f"{what} at {where}, the refused update number {progress.bad_in_row} in a row (--max-bad-steps); the "
                "weights are as before them. Try a lower --lr, --clip-grad 1 or --amp-dtype bfloat16, and go on with "
                "--resume"
            )


def _describe(update: Update) -> str:
    if not math.isfinite(update.loss):
        return f"the loss became {update.loss}"
    return f"the loss is {update.loss:.4f} but the norm of the gradients became {update.gradient_norm}"


def _suspects(files: Sequence[Sequence[str]], bad_batches: Sequence[int]) -> list[str]:
    """Files of the batches whose loss is not finite; where there are none in any process, of the whole group."""
    own = [files[number] for number in bad_batches], files
    found = [own]
    if dist.is_initialized():
        found = [own] * dist.get_world_size()
        dist.all_gather_object(found, own)
    bad = [name for of_rank, _ in found for batch in of_rank for name in batch]
    return bad or [name for _, of_rank in found for batch in of_rank for name in batch]
