"""Progress output of a run: a bar on a terminal, plain lines elsewhere, and TensorBoard or Weights & Biases.

The packages of the two trackers are imported only if they are requested.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from linvit.output.files import reason
from linvit.output.terminal import SECONDS_BETWEEN_LINES, format_duration, note, print_line
from linvit.training.config import TrainConfig

Item = TypeVar("Item")
# Logs numbers by name; the second argument is the number of batches that the run has trained on.
Track = Callable[[Mapping[str, float], int], None]
SECONDS_BETWEEN_REFRESHES = 0.25


@contextmanager
def lasting_output() -> Iterator[None]:
    """Continue if stdout or stderr is lost: the reader of a pipe or the terminal is gone, or a disk is full."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _LastingStream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _LastingStream:
    """A text stream that discards what is written to it after its first error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], object]) -> None:
        if self._is_lost:
            return
        try:
            work()
        except OSError as error:
            self._is_lost = True
            # What is buffered would fail again at the end of the process.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._stream is not sys.__stderr__:
                note(f"warning: cannot write to stdout: {reason(error)}; training continues without its output")


class EpochLog:
    """Times an epoch of training and shows its progress.

    Args:
        epoch, num_epochs: this epoch, and the number of epochs in the run.
        first_batch, num_batches: where this process starts in the epoch, and the number of batches in the epoch.
        images_per_batch: images per batch in all processes together.
        log_interval: batches between two plain lines, which are also printed after ten seconds without one; and the
            number of updates over which the loss is averaged.
        is_shown: whether this process prints.
        track: also logs the numbers, every `log_interval` batches.
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
        self.data_seconds = 0.0
        self.started = self.refreshed = self.printed = time.perf_counter()
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
        """Yield the batches, and measure the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.data_seconds += time.perf_counter() - start
            yield item

    def update(self, *, batch: int, loss: float, lr: float) -> None:
        """Show the progress after an update; `batch` is the number of finished batches of the epoch."""
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
        elif self.is_shown and (is_due or time.perf_counter() - self.refreshed >= SECONDS_BETWEEN_LINES):
            self.refreshed = self.printed = time.perf_counter()
            print_line(f"epoch {self.epoch}  {self.batch}/{self.num_batches}  {self._text(lr)}")

    def show_accumulated(self, *, batch: int) -> None:
        """Print a line after ten seconds without one, where the update of this batch is still to come."""
        now = time.perf_counter()
        if self.bar is None and self.is_shown and now - self.printed >= SECONDS_BETWEEN_LINES:
            # The next update still prints its line with the loss.
            self.printed = now
            speed = (batch - self.first_batch) * self.images_per_batch / (now - self.started)
            print_line(f"epoch {self.epoch}  {batch}/{self.num_batches}  accumulating gradients  {speed:.1f} img/s")

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
            f"lr {lr:.2e}  left {format_duration(seconds_left)}"
        )

    def timing(self, seconds: float | None = None) -> dict[str, float]:
        """Images per second in all processes, the share of time spent waiting for data, and the seconds so far."""
        seconds = self.seconds if seconds is None else seconds
        images = (self.batch - self.first_batch) * self.images_per_batch
        return {"images_per_second": images / seconds, "data_wait": self.data_seconds / seconds, "seconds": seconds}


def _create_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(),
        # The loop refreshes the bar: a separate thread would take time from training.
        auto_refresh=False,
        transient=True,
        expand=True,
    )


@contextmanager
def open_trackers(config: TrainConfig, folder: Path, *, first_batch: int) -> Iterator[Track]:
    """A function that logs numbers to the trackers that `config` requests; they are closed at the end.

    Args:
        folder: the run's folder.
        first_batch: the batch that training resumes from; TensorBoard drops what was logged for later ones.

    Raises ValueError if a package is missing or wandb does not start.
    """
    with ExitStack() as opened:
        tracks = []
        if config.log_tensorboard:
            tracks.append(opened.enter_context(_open_tensorboard(folder / "tensorboard", first_batch)))
        if config.log_wandb:
            tracks.append(opened.enter_context(_open_wandb(config, folder)))

        def track(numbers: Mapping[str, float], batch: int) -> None:
            for each in tracks:
                each(numbers, batch)

        yield track


@contextmanager
def _open_tensorboard(folder: Path, first_batch: int) -> Iterator[Track]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("--log-tensorboard", "tensorboard") from error
    # Closing ends the writer's thread.
    with SummaryWriter(str(folder), purge_step=first_batch or None) as writer:

        def track(numbers: Mapping[str, float], batch: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, batch)
            # At once, since the run may be killed.
            writer.flush()

        yield track


@contextmanager
def _open_wandb(config: TrainConfig, folder: Path) -> Iterator[Track]:
    try:
        import wandb
    except ImportError as error:
        raise _missing("--log-wandb", "wandb") from error
    try:
        run = wandb.init(
            project=config.wandb_project,
            name=folder.name,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            tags=list(config.wandb_tags),
            id=config.wandb_resume_id,
            resume="must" if config.wandb_resume_id else None,
        )
    except wandb.Error as error:
        raise ValueError(
            f"--log-wandb: wandb does not start ({reason(error)}); run `wandb login`, or set WANDB_MODE=offline"
        ) from error
    # An error within the statement marks wandb's run as failed.
    with run:
        yield lambda numbers, batch: run.log(dict(numbers), step=batch)


def _missing(flag: str, package: str) -> ValueError:
    return ValueError(f"{flag} needs the package {package}: pip install 'linvit[log]', or remove the flag")


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a row of summary.csv, under the names that trackers show."""
    return {f"epoch/{name}": value for name, value in row.items() if isinstance(value, int | float) and name != "epoch"}
