"""Output of a run: its folder and the terminal. Only the first process writes both; the others keep a log file each."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from linvit.data.augment.build import InputSpec
from linvit.data.loader import Batch, Loader
from linvit.data.sources.base import ImageSet
from linvit.distributed import Ranks, on_primary
from linvit.evaluation.predictions import write_predictions
from linvit.output.files import printable, remove_leftovers
from linvit.runs.checkpoint import prune_checkpoints, read_checkpoint, retire_later, write_checkpoint
from linvit.runs.folder import RunFolder, lock_run, save_classifier
from linvit.runs.lora import merge_adapters
from linvit.runs.weights import compact
from linvit.training.config import TrainConfig
from linvit.training.faults import BadImages, BadSteps
from linvit.training.fingerprint import changed_data, fingerprint
from linvit.training.log import Track, numbers_of, open_trackers, print_line
from linvit.training.model import train_size
from linvit.training.resume import changed_settings, choose_start, find_state
from linvit.training.saver import SaveClock, Saver, take_snapshot
from linvit.training.state import Progress, collect_state, restore_state
from linvit.training.step import TrainStep, Update
from linvit.training.summary import EpochResult, write_card, write_summary
from linvit.version import __version__

# A copied state, once its copies are complete.
Snapshot = Callable[[], dict[str, Any]]
# Keys of the weights in a state.
_STATE_DICTS = {"raw": "state_dict", "ema": "state_dict_ema"}


@contextmanager
def recording(
    config: TrainConfig,
    step: TrainStep,
    train_set: ImageSet,
    val_set: ImageSet,
    *,
    train_loader: Loader,
    val_loader: Loader,
    spec: InputSpec,
    new_parameters: list[str],
) -> Iterator[tuple["Recorder", Progress]]:
    """Open the run's folder and, if the run resumes, restore the state of `step`; yields the run's progress, too.

    The folder stays locked inside the `with` statement. At its end, the current save is finished before the lock is
    released.

    Args:
        new_parameters: names of the parameters that the given weights lack.

    Raises ValueError if there is nothing to resume from, the checkpoint does not fit or another process is training in
    the folder, OSError if the folder cannot be written.
    """
    start = on_primary(lambda: choose_start(config, img_size=spec.size))
    locks: list[IO[bytes] | None] = []
    on_primary(lambda: locks.append(lock_run(start.folder)))
    with ExitStack() as stack:
        for lock in filter(None, locks):
            stack.enter_context(lock)
        saver = stack.enter_context(Saver())
        recorder = Recorder(
            start.folder,
            config=config,
            train_set=train_set,
            val_set=val_set,
            loader=train_loader,
            spec=spec,
            ranks=step.ranks,
            saver=saver,
            opened=stack,
        )
        for loader in (train_loader, val_loader):
            if loader.cache is not None:
                recorder.log(loader.cache.describe())
        progress = Progress()
        state = read_checkpoint(start.state) if start.state is not None else None
        if state is not None:
            progress = _resume(state, config, step, (train_set, val_set), recorder.data, num_batches=len(train_loader))
            for change in changed_data(state.get("data"), recorder.data, (train_set, val_set)):
                recorder.log(f"changed data: {change}")
        recorder.begin(step, progress, state=state, new_parameters=new_parameters)
        # The state would stay in memory for the whole run.
        del state
        for note in filter(None, dict.fromkeys((train_set.note, val_set.note))):
            recorder.log(note)
        yield recorder, progress


def check_resume(
    config: TrainConfig, step: TrainStep, train_set: ImageSet, val_set: ImageSet, *, num_batches: int
) -> None:
    """Resume `step` without a run's folder, if `resume` is set; raises ValueError as `recording` does."""
    path = find_state(config)
    if path is not None:
        sets = (train_set, val_set)
        _resume(read_checkpoint(path), config, step, sets, _fingerprints(*sets), num_batches=num_batches)


def _fingerprints(train_set: ImageSet, val_set: ImageSet) -> dict[str, Any]:
    return {"training": fingerprint(train_set), "validation": fingerprint(val_set)}


def _resume(
    state: dict[str, Any],
    config: TrainConfig,
    step: TrainStep,
    sets: tuple[ImageSet, ImageSet],
    data: dict[str, Any],
    *,
    num_batches: int,
) -> Progress:
    """Restore a state; ValueError if it does not fit, or if the images changed and that is not allowed."""
    progress = restore_state(
        state,
        step,
        settings=config.model_dump(mode="json"),
        class_names=sets[0].class_names,
        num_images=len(sets[0]),
        num_batches=num_batches,
        with_optimizer=not config.no_resume_opt,
    )
    changes = changed_data(state.get("data"), data, sets)
    if changes and not config.allow_changed_data:
        raise ValueError(
            f"--resume: since the checkpoint was saved, {'; '.join(changes)}: restore the data, or use "
            "--allow-changed-data to continue with the new ones"
        )
    return progress


class Recorder:
    """Fills a run's folder.

    If a file cannot be written during training, this is reported, the old file stays, and the next save retries. At the
    beginning and at the end of the run an OSError that names the file is raised.

    Args:
        folder: the run's folder, which exists and which this run has locked.
        config: the run's configuration.
        train_set, val_set: the images to train and to evaluate on.
        loader: the training loader.
        spec: how images are prepared.
        ranks: this process; the first prints and writes, the others write a log each to logs/.
        saver: writes in the background.
        opened: closes what the recorder opens, at the end of the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: TrainConfig,
        train_set: ImageSet,
        val_set: ImageSet,
        loader: Loader,
        spec: InputSpec,
        ranks: Ranks,
        saver: Saver,
        opened: ExitStack,
    ) -> None:
        # args.yaml repeats the run from the start; it does not resume it.
        own = {"experiment": folder.name, "output": folder.parent, "resume": None, "no_resume_opt": False}
        self.config = config.model_copy(update={**own, "allow_changed_data": False})
        self.run = RunFolder(folder)
        self.train_set, self.val_set, self.loader, self.spec = train_set, val_set, loader, spec
        self.data = _fingerprints(train_set, val_set)
        self.rank, self.is_primary, self.saver = ranks.rank, ranks.is_primary, saver
        self.clock = SaveClock(updates=config.checkpoint_interval, minutes=config.checkpoint_minutes)
        self.track: Track | None = None
        self._opened = opened
        # Not a method: a cycle through it would keep the loaders, and their processes, alive after the run.
        self.log = partial(_log_line, run=self.run, rank=ranks.rank)
        self.bad_steps = BadSteps(config.max_bad_steps, path_of=train_set.path, log=self.log)
        self.bad_images = BadImages(self.run.bad_images, is_primary=self.is_primary, log=self.log)

    def begin(
        self,
        step: TrainStep,
        progress: Progress,
        *,
        state: dict[str, Any] | None,
        new_parameters: list[str],
    ) -> None:
        """Print what is trained, prepare the folder and write args.yaml.

        A new run saves its state at once, so that a run that cannot be saved fails before it trains.

        Args:
            state: the state that the run resumes from; None for a new run.
            new_parameters: names of the parameters that the given weights lack.
        """
        if self.is_primary:
            self._print_overview(step, new_parameters)
            if state is not None:
                print_line(f"resuming at epoch {progress.epoch}, batch {progress.batch}")
                for change in changed_settings(state["settings"], self.config.model_dump(mode="json")):
                    print_line(f"changed setting: {change}")
            self._prepare_folder(progress)
        if state is None:
            self.save_state(step, progress)

    def _print_overview(self, step: TrainStep, new_parameters: list[str]) -> None:
        config = self.config
        print_line(f"run: {self.run.path}")
        print_line(
            f"data: {config.data_dir}, {len(self.loader.class_names)} classes, "
            f"{len(self.train_set):,} training images, {len(self.val_set):,} validation images"
        )
        parameters = list(step.plain_model.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        frozen = sum(parameter.numel() for parameter in parameters) - trained
        print_line(
            f"model: {config.model} at {self.spec.size[0]}×{self.spec.size[1]} px, {trained:,} trainable parameters"
            + (f", {frozen:,} frozen" if frozen else "")
        )
        if config.pretrained or config.pretrained_path is not None:
            print_line(f"new parameters, not in the given weights: {compact(new_parameters) or 'none'}")

    def _prepare_folder(self, progress: Progress) -> None:
        """Remove what a killed run left behind, set aside later checkpoints, and open the trackers."""
        self.run.checkpoints.mkdir(exist_ok=True)
        for folder in (self.run.path, self.run.checkpoints):
            remove_leftovers(folder)
        for path in retire_later(self.run.checkpoints, epoch=progress.epoch, batch=progress.batch):
            print_line(f"set aside a checkpoint that is later than the resumed one: {path}")
        first_batch = progress.epoch * len(self.loader) + progress.batch
        self.track = self._opened.enter_context(open_trackers(self.config, self.run.path, first_batch=first_batch))
        self.config.save(self.run.args)
        if progress.summary:
            write_summary(self.run.summary, progress.summary)

    def begin_epoch(self, epoch: int) -> None:
        """Log the image size, if it differs from the previous epoch."""
        size = train_size(epoch, self.config)
        if size is not None and (epoch == 0 or size != train_size(epoch - 1, self.config)):
            self.log(f"epoch {epoch}: training at {size}×{size} px")

    def add_batch(self, batch: Batch) -> None:
        """Record a batch: its images, in case its update is refused, and those that could not be read."""
        self.bad_steps.add_batch(batch.indices)
        self.bad_images.add(map(self.train_set.path, batch.unreadable))

    def check_update(self, update: Update, step: TrainStep, progress: Progress, *, group_start: int) -> None:
        """Log and count an update that was refused.

        Raises NonFiniteLossError after too many in a row, with a checkpoint from before the first of them.
        """
        self.bad_steps.check(
            update, progress, group_start=group_start, save=lambda before: self.save_state(step, before)
        )

    def check_epoch(self, step: TrainStep, progress: Progress) -> None:
        """Raise ValueError at the end of an epoch without a single loss: there is nothing to evaluate and save."""
        if progress.num_losses:
            return
        self.bad_steps.end_epoch(progress, save=lambda before: self.save_state(step, before))
        self.bad_images.end_epoch()
        raise ValueError(
            f"{self.config.data_dir}: none of the training images of epoch {progress.epoch} can be read "
            f"({self.run.bad_images} lists them); restore them"
        )

    def end_epoch(self, result: EpochResult, step: TrainStep, progress: Progress, *, best: str | None) -> None:
        """Write the epoch's row of summary.csv, last/ (raw weights), best/ (those called `best`) and the state."""
        if result.metrics:
            self.bad_images.add(map(self.val_set.path, result.metrics["raw"].unreadable))
        self.bad_images.end_epoch()
        progress.summary.append(result.row())
        self.log(result.describe() + (f"  best ({best})" if best is not None else ""))
        if self.track is not None:
            self.track(numbers_of(progress.summary[-1]), progress.epoch * len(self.loader))
        snapshot = self._snapshot(step, progress)
        if snapshot is None:
            return
        tasks: dict[str, Callable[[], object]] = {
            "summary": lambda: write_summary(self.run.summary, snapshot()["progress"]["summary"]),
            "last": lambda: self._write_weights(self.run.last, result, step, snapshot, "raw"),
        }
        if best is not None:
            tasks["best"] = lambda: self._write_best(result, step, snapshot, best)
        # The state comes last: it must not be newer than results that a resumed run would not write again.
        self.saver.save(tasks | {"state": lambda: self._write_state(snapshot)})

    def end_update(self, step: TrainStep, progress: Progress) -> None:
        """Start saving the state, if a save is due."""
        if self._is_due(step):
            self._start_saving(step, progress)

    def _is_due(self, step: TrainStep) -> bool:
        if not step.is_sharded:
            return self.is_primary and self.clock.is_due()
        # All processes take part in a save, so the clock of the first decides.
        return self.clock.is_set and on_primary(self.clock.is_due)

    def end(self, progress: Progress) -> None:
        """Wait until everything is written, and log the best result."""
        self.saver.finish()
        if progress.best is not None:
            self.log(f"best {self.config.eval_metric} {progress.best:.4f}; the weights are in {self.run.best}")

    def stop(self, step: TrainStep, progress: Progress) -> int:
        """Save the state after a stop request, and wait until it is written; returns the exit status."""
        self.save_state(step, progress)
        self.log(f"stopped; continue with --resume {self.run.path}")
        return step.stop.exit_code

    def save_state(self, step: TrainStep, progress: Progress) -> None:
        """Save the state and wait until everything is written; all processes must call it."""
        self._start_saving(step, progress)
        self.saver.finish()

    def _start_saving(self, step: TrainStep, progress: Progress) -> None:
        snapshot = self._snapshot(step, progress)
        if snapshot is not None:
            self.saver.save({"state": lambda: self._write_state(snapshot)})

    def _snapshot(self, step: TrainStep, progress: Progress) -> Snapshot | None:
        """A copy of the state in the first process; None in the others, which contribute their shards."""
        if not self.is_primary and not step.is_sharded:
            return None
        # Only one copy is in memory at a time.
        self.saver.wait()
        self.clock.restart()
        state = collect_state(
            step,
            progress,
            settings=self.config.model_dump(mode="json"),
            class_names=self.loader.class_names,
            num_images=len(self.train_set),
            num_batches=len(self.loader),
            data=self.data,
        )
        return take_snapshot(state, step.ranks.device) if self.is_primary else None

    def _write_state(self, snapshot: Snapshot) -> None:
        write_checkpoint(self.run.checkpoints, snapshot())
        prune_checkpoints(self.run.checkpoints, keep=self.config.checkpoint_hist, milestones=self.config.save_epochs)

    def _write_best(self, result: EpochResult, step: TrainStep, snapshot: Snapshot, which: str) -> None:
        self._write_weights(self.run.best, result, step, snapshot, which)
        results = result.metrics[which].results
        if results is not None:
            write_predictions(self.run.predictions, results, self.val_set)
        write_card(
            self.run.card,
            config=self.config,
            class_names=self.loader.class_names,
            img_size=self.spec.size,
            epoch=result.epoch,
            weights=which,
            metrics=result.metrics[which],
        )

    def _write_weights(
        self, folder: Path, result: EpochResult, step: TrainStep, snapshot: Snapshot, which: str
    ) -> None:
        metrics = result.metrics.get(which)
        values = {} if metrics is None else {"top1": metrics.top1, "top5": metrics.top5, "loss": metrics.loss}
        save_classifier(
            folder,
            step.weights[which],
            merge_adapters(snapshot()[_STATE_DICTS[which]], path=folder),
            class_names=self.loader.class_names,
            spec=self.spec,
            about={"version": __version__, "epoch": result.epoch, "weights": which, "metrics": values},
        )


def _log_line(text: str, *, run: RunFolder, rank: int) -> None:
    """Print a line in the first process; the others append it to their log file."""
    if rank == 0:
        print_line(text)
    else:
        run.logs.mkdir(exist_ok=True)
        with (run.logs / f"rank-{rank}.log").open("a", encoding="utf-8") as file:
            file.write(f"{printable(text)}\n")
