"""What a run tells while it goes: a progress bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from linvit.training.trackers import Track

Item = TypeVar("Item")
SECONDS_BETWEEN_REFRESHES = 0.25


def say(text: str) -> None:
    """Print a line at once, even into a pipe."""
    print(text, flush=True)


class EpochLog:
    """Times an epoch of training and shows how it goes.

    Args:
        epoch, num_epochs: of the run.
        first_batch, num_batches: of the epoch, in this process.
        images_per_batch: over all processes.
        log_interval: batches from one plain line to the next, and updates that the loss shown is a mean of.
        is_shown: whether this process prints.
        track: gets the numbers of every plain line as well; see `linvit.training.trackers`.
    """

    def __init__(
        self,
        *,
        epoch: int,
        num_epochs: int,
        first_batch: int,
        num_batches: int,
        images_per_batch: int,
        log_interval: int,
        is_shown: bool,
        track: Track | None = None,
    ) -> None:
        self.epoch, self.num_epochs = epoch, num_epochs
        self.first_batch, self.num_batches, self.batch = first_batch, num_batches, first_batch
        self.images_per_batch, self.log_interval, self.is_shown = images_per_batch, log_interval, is_shown
        self.track = track
        self.recent_losses: deque[float] = deque(maxlen=log_interval)
        self.waited = 0.0
        self.started = self.refreshed = time.perf_counter()
        self.bar = _create_bar() if is_shown and sys.stdout.isatty() else None

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.task = self.bar.add_task(f"epoch {self.epoch}", total=self.num_batches, completed=self.batch, text="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self.started
        if self.bar is not None:
            self.bar.stop()

    def timed(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches, with the time that each is waited for."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            yield item

    def update(self, *, batch: int, loss: float, lr: float) -> None:
        """Show an update after which `batch` batches of the epoch are done."""
        before, self.batch = self.batch, batch
        self.recent_losses.append(loss)
        is_due = self.batch // self.log_interval > before // self.log_interval
        if is_due and self.track is not None:
            self.track(self._numbers(lr), self.epoch * self.num_batches + self.batch)
        if self.bar is not None:
            now = time.perf_counter()
            if now - self.refreshed >= SECONDS_BETWEEN_REFRESHES or self.batch == self.num_batches:
                self.refreshed = now
                self.bar.update(self.task, completed=self.batch, text=self._text(lr))
                self.bar.refresh()
        elif is_due and self.is_shown:
            say(f"epoch {self.epoch}  {self.batch}/{self.num_batches}  {self._text(lr)}")

    def _numbers(self, lr: float) -> dict[str, float]:
        timing = self.timing(time.perf_counter() - self.started)
        return {
            "train/loss": self._mean_loss(),
            "train/lr": lr,
            "train/images_per_second": timing["images_per_second"],
            "train/data_wait": timing["data_wait"],
        }

    def _mean_loss(self) -> float:
        return sum(self.recent_losses) / len(self.recent_losses)

    def _text(self, lr: float) -> str:
        timing = self.timing(time.perf_counter() - self.started)
        batches_left = self.num_batches - self.batch + (self.num_epochs - self.epoch - 1) * self.num_batches
        seconds_left = batches_left * self.images_per_batch / max(timing["images_per_second"], 1e-9)
        return (
            f"loss {self._mean_loss():.4f}  {timing['images_per_second']:.1f} img/s  data {timing['data_wait']:.0%}  "
            f"lr {lr:.2e}  left {timedelta(seconds=round(seconds_left))}"
        )

    def timing(self, seconds: float | None = None) -> dict[str, float]:
        """Images a second over all processes, share of the time spent waiting for data, and seconds, of this epoch."""
        seconds = self.seconds if seconds is None else seconds
        images = (self.batch - self.first_batch) * self.images_per_batch
        return {"images_per_second": images / seconds, "data_wait": self.waited / seconds, "seconds": seconds}


def _create_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(),
        # Refreshed by the loop itself: a thread of its own would take time from it.
        auto_refresh=False,
        transient=True,
        expand=True,
    )
