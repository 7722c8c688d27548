"""Faults that a run survives: images that cannot be read, and updates whose loss or gradients are not finite."""

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
    """Collects the images that could not be read and were skipped, over an epoch and all processes.

    Args:
        file: the run's bad_images.txt, one path per line, sorted; written if there are any.
        is_primary: whether this process writes the file.
        log: prints a line.
    """

    def __init__(self, file: Path, *, is_primary: bool, log: Callable[[str], None]) -> None:
        self.file, self.is_primary, self.log = file, is_primary, log
        self._found: set[str] = set()

    def add(self, paths: Iterable[Path]) -> None:
        self._found |= {str(path) for path in paths}

    def end_epoch(self) -> None:
        """Log the images skipped in this epoch and add them to the file; all processes must call it."""
        found = [self._found]
        if dist.is_initialized():
            found = [set()] * dist.get_world_size()
            dist.all_gather_object(found, self._found)
        names = sorted(set().union(*found))
        self._found = set()
        if not names:
            return
        images = "1 image" if len(names) == 1 else f"{len(names):,} images"
        self.log(f"skipped {images} that cannot be read: {listed(names)} ({self.file})")
        if self.is_primary:
            before = _read_lines(self.file) if self.file.is_file() else []
            write_text(self.file, "".join(f"{name}\n" for name in sorted({*before, *names})))


def _read_lines(file: Path) -> list[str]:
    # `splitlines` would also split at separators that file names may contain.
    return file.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n").split("\n")


class NonFiniteLossError(ValueError):
    """Loss or gradients were not finite in too many updates in a row; none of these updates changed a weight."""


class BadSteps:
    """Logs and counts updates that were refused because loss or gradients are not finite.

    Args:
        max_in_row: the run ends after this number of refused updates in a row.
        path_of: returns the file of an image, given its index.
        log: prints a line.
    """

    def __init__(self, max_in_row: int, *, path_of: Callable[[int], Path], log: Callable[[str], None]) -> None:
        self.max_in_row, self.path_of, self.log = max_in_row, path_of, log
        # The image indices of each batch of the group.
        self._group: list[Tensor] = []
        # The progress before the first refused update of the current row.
        self._row_start: Progress | None = None

    def add_batch(self, indices: Tensor) -> None:
        """Add the image indices of a batch to the group of the next update."""
        self._group.append(indices)

    def check(self, update: Update, progress: Progress, *, group_start: int, save: Callable[[Progress], None]) -> None:
        """Count a refused update in `progress` and log its cause.

        Args:
            progress: the progress after the update.
            group_start: the first batch of the update's group.
            save: saves the run's state with a given progress.

        Raises NonFiniteLossError in all processes after too many refused updates in a row. A checkpoint from before
        the first of them is saved.
        """
        group, self._group = self._group, []
        for note in update.notes:
            self.log(note)
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
        self.log(f"refused an update ({where}): {what}; its images: {suspects}")
        if progress.bad_in_row >= self.max_in_row:
            save(self._row_start)
            raise NonFiniteLossError(
                f"{what} at {where}, refused update number {progress.bad_in_row} in a row (--max-bad-steps); they did "
                "not change the weights; try a lower --lr, --clip-grad 1 or --amp-dtype bfloat16, and --resume"
            )

    def end_epoch(self, progress: Progress, *, save: Callable[[Progress], None]) -> None:
        """Raise NonFiniteLossError, as `check` does, if all updates of the epoch were refused."""
        if progress.bad_in_row and not progress.num_losses:
            if self._row_start is not None:
                save(self._row_start)
            raise NonFiniteLossError(
                f"loss or gradients were not finite in any update of epoch {progress.epoch}, so the weights did not "
                "change; try a lower --lr, --clip-grad 1 or --amp-dtype bfloat16, and --resume"
            )


def _describe(update: Update) -> str:
    if not math.isfinite(update.loss):
        return f"the loss became {update.loss}"
    return f"the loss is {update.loss:.4f}, but the norm of the gradients became {update.gradient_norm}"


def _suspects(files: Sequence[Sequence[str]], bad_batches: Sequence[int]) -> list[str]:
    """The files of the batches whose loss is not finite, in any process; all files of the group if there are none."""
    own = [files[number] for number in bad_batches], files
    found = [own]
    if dist.is_initialized():
        found = [own] * dist.get_world_size()
        dist.all_gather_object(found, own)
    bad = [name for of_rank, _ in found for batch in of_rank for name in batch]
    return bad or [name for _, of_rank in found for batch in of_rank for name in batch]
