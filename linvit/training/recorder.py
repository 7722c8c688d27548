"""What a run writes and prints while it goes; processes besides the first only keep a log each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from linvit.data.augment.build import InputSpec
from linvit.data.loader import Loader
from linvit.data.sources.base import ImageSet
from linvit.distributed import StopRequest, on_primary
from linvit.output.files import remove_leftovers
from linvit.runs.checkpoint import prune_checkpoints, read_checkpoint, retire_later, write_checkpoint
from linvit.runs.folder import RunFolder, lock_run, save_classifier
from linvit.runs.weights import compact
from linvit.training.config import TrainConfig
from linvit.training.faults import BadImages, BadSteps
from linvit.training.log import Track, numbers_of, open_trackers, say
from linvit.training.model import size_in
from linvit.training.saver import SaveClock, Saver, take_snapshot
from linvit.training.state import Progress, changed_settings, choose_start, collect_state, restore_state
from linvit.training.step import TrainStep
from linvit.training.summary import EpochResult, write_card, write_summary
from linvit.version import __version__

# Keys of the weights in a state.
_STATE_DICTS = {"raw": "state_dict", "ema": "state_dict_ema"}


def start_recording(
    config: TrainConfig,
    step: TrainStep,
    train_set: ImageSet,
    val_set: ImageSet,
    *,
    loaders: Sequence[Loader],
    spec: InputSpec,
    new_parameters: list[str],
    saver: Saver,
) -> tuple["Recorder", Progress]:
    """Open the run's folder and, where it is resumed, put `step` back to its state; returns how far the run has come.

    Args:
        loaders: the training loader, then the validation loader.
        new_parameters: names of the parameters that no given weights cover.

    Raises ValueError where there is nothing to resume from or its state does not fit, OSError where the folder cannot
    be written.
    """
    loader, ranks = loaders[0], step.ranks
    start = on_primary(lambda: choose_start(config, img_size=spec.size))
    num_images = (len(train_set), len(val_set))
    recorder = Recorder(
        start.folder, config=config, loader=loader, spec=spec, num_images=num_images, rank=ranks.rank, saver=saver
    )
    for cache in (each.cache for each in loaders):
        if cache is not None:
            recorder.say(cache.describe())
    recorder.bad_steps = BadSteps(config.max_bad_steps, path_of=train_set.path, say=recorder.say)
    recorder.bad_images = BadImages(recorder.run.bad_images, is_primary=ranks.is_primary, say=recorder.say)
    progress = Progress()
    state = read_checkpoint(start.state) if start.state is not None else None
    if state is not None:
        progress = restore_state(
            state,
            step,
            settings=config.model_dump(mode="json"),
            class_names=train_set.class_names,
            num_images=len(train_set),
            num_batches=len(loader),
            with_optimizer=not config.no_resume_opt,
        )
    recorder.begin(step, progress, state=state, new_parameters=new_parameters)
    for note in filter(None, dict.fromkeys((train_set.note, val_set.note))):
        recorder.say(note)
    return recorder, progress


class Recorder:
    """Fills a run's folder.

    Args:
        folder: the run's, made already.
        config: how it is trained.
        loader: what it is trained on.
        spec: how its images are prepared.
        num_images: to train and to evaluate on.
        rank: of this process; the first prints and writes, the others have a file of lines each in logs/.
        saver: what writes in the background.

    While training, what cannot be written is reported and tried again with the next save. At the beginning and at the
    end it raises OSError, naming the file; what was there before is kept. Raises ValueError where another process is
    training in the folder.
    """

    bad_steps: BadSteps
    bad_images: BadImages

    def __init__(
        self,
        folder: Path,
        *,
        config: TrainConfig,
        loader: Loader,
        spec: InputSpec,
        num_images: tuple[int, int],
        rank: int,
        saver: Saver,
    ) -> None:
        # Training from args.yaml alone repeats the run; it does not go on with it.
        apart = {"experiment": folder.name, "output": folder.parent, "resume": None, "no_resume_opt": False}
        self.config = config.model_copy(update=apart)
        self.track: Track | None = None
        self.run = RunFolder(folder)
        self.loader, self.spec, self.rank, self.is_primary = loader, spec, rank, rank == 0
        self.num_images, self.saver = num_images, saver
        self._lock = lock_run(folder) if self.is_primary else None
        self.clock = SaveClock(updates=config.checkpoint_interval, minutes=config.checkpoint_minutes)

    def say(self, text: str) -> None:
        """Print a line in the first process; the others append it to a file of their own."""
        if self.is_primary:
            say(text)
        else:
            self.run.logs.mkdir(exist_ok=True)
            with (self.run.logs / f"rank-{self.rank}.log").open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")

    def begin(
        self,
        step: TrainStep,
        progress: Progress,
        *,
        state: dict[str, Any] | None,
        new_parameters: list[str],
    ) -> None:
        """Say what is trained and where it is kept, clear up after a run that was killed, and write args.yaml.

        A run that begins saves its state at once: what cannot be saved should not begin.

        Args:
            state: what the run goes on from; None: it begins.
            new_parameters: those that no given weights cover.
        """
        if self.is_primary:
            self._introduce(step, progress, state=state, new_parameters=new_parameters)
        if state is None:
            self.save_state(step, progress)

    def _introduce(
        self,
        step: TrainStep,
        progress: Progress,
        *,
        state: dict[str, Any] | None,
        new_parameters: list[str],
    ) -> None:
        config = self.config
        say(f"run: {self.run.path}")
        say(
            f"data: {config.data_dir}, {len(self.loader.class_names)} classes, {self.num_images[0]:,} images to train "
            f"and {self.num_images[1]:,} to evaluate on"
        )
        parameters = list(step.plain_model.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        frozen = sum(parameter.numel() for parameter in parameters) - trained
        say(
            f"model: {config.model} at {self.spec.size[0]}×{self.spec.size[1]} px, {trained:,} parameters to train"
            + (f", {frozen:,} frozen" if frozen else "")
        )
        if config.pretrained or config.pretrained_path is not None:
            say(f"new, since the given weights do not cover them: {compact(new_parameters) or 'no parameters'}")
        if state is not None:
            say(f"going on at epoch {progress.epoch}, batch {progress.batch}")
            for change in changed_settings(state["settings"], config.model_dump(mode="json")):
                say(f"changed since: {change}")
        self.run.checkpoints.mkdir(exist_ok=True)
        for folder in (self.run.path, self.run.checkpoints):
            remove_leftovers(folder)
        for path in retire_later(self.run.checkpoints, epoch=progress.epoch, batch=progress.batch):
            say(f"set aside, being later than where the run goes on: {path}")
        self.track = open_trackers(
            config, self.run.path, first_batch=progress.epoch * len(self.loader) + progress.batch
        )
        config.save(self.run.args)
        if progress.summary:
            write_summary(self.run.summary, progress.summary)

    def begin_epoch(self, epoch: int) -> None:
        """Say the size of the images, where it is another than in the epoch before."""
        size = size_in(epoch, self.config)
        if size is not None and (epoch == 0 or size != size_in(epoch - 1, self.config)):
            self.say(f"epoch {epoch} on images of {size}×{size} px")

    def end_epoch(self, result: EpochResult, step: TrainStep, progress: Progress, *, best: str | None) -> None:
        """Write the epoch's row, the raw weights to last/, those named `best` to best/, and the run's state."""
        progress.summary.append(result.row())
        self.say(result.describe() + (f"  best ({best})" if best is not None else ""))
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
        # Last: a state is never ahead of the results that a run going on from it would not make again.
        self.saver.save(tasks | {"state": lambda: self._write_state(snapshot)})

    def end_update(self, step: TrainStep, progress: Progress) -> None:
        """Begin to save the state, where the time has come."""
        if self._is_due(step):
            self._begin_to_save(step, progress)

    def _is_due(self, step: TrainStep) -> bool:
        if not step.is_sharded:
            return self.is_primary and self.clock.is_due()
        # All processes take part in a save, at the same update whatever their clocks say.
        return self.clock.is_set and on_primary(self.clock.is_due)

    def end(self, progress: Progress) -> None:
        """Wait until all is written, and say what came out."""
        self.saver.finish()
        if progress.best is not None:
            self.say(f"best {self.config.eval_metric} {progress.best:.4f}; the weights are in {self.run.best}")

    def stop(self, request: StopRequest, step: TrainStep, progress: Progress) -> int:
        """Save the state, as the run was asked to stop, and wait until it is written; returns the exit status."""
        self.save_state(step, progress)
        self.say(f"stopped; go on with --resume {self.run.path}")
        return request.exit_code

    def save_state(self, step: TrainStep, progress: Progress) -> None:
        """Save the state and wait until it, and all before, is written; all processes call it."""
        self._begin_to_save(step, progress)
        self.saver.finish()

    def _begin_to_save(self, step: TrainStep, progress: Progress) -> None:
        snapshot = self._snapshot(step, progress)
        if snapshot is not None:
            self.saver.save({"state": lambda: self._write_state(snapshot)})

    def _snapshot(self, step: TrainStep, progress: Progress) -> Callable[[], dict[str, Any]] | None:
        """A copy of the state, in the first process; the others have None, having given their parts of it."""
        if not self.is_primary and not step.is_sharded:
            return None
        # One at a time is in memory.
        self.saver.wait()
        self.clock.restart()
        state = collect_state(
            step,
            progress,
            settings=self.config.model_dump(mode="json"),
            class_names=self.loader.class_names,
            num_images=self.num_images[0],
            num_batches=len(self.loader),
        )
        return take_snapshot(state, step.ranks.device) if self.is_primary else None

    def _write_state(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        write_checkpoint(self.run.checkpoints, snapshot())
        prune_checkpoints(self.run.checkpoints, keep=self.config.checkpoint_hist, milestones=self.config.save_epochs)

    def _write_best(
        self, result: EpochResult, step: TrainStep, snapshot: Callable[[], dict[str, Any]], which: str
    ) -> None:
        self._write_weights(self.run.best, result, step, snapshot, which)
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
        self, folder: Path, result: EpochResult, step: TrainStep, snapshot: Callable[[], dict[str, Any]], which: str
    ) -> None:
        metrics = result.metrics.get(which)
        values = {} if metrics is None else {"top1": metrics.top1, "top5": metrics.top5, "loss": metrics.loss}
        save_classifier(
            folder,
            step.weights[which],
            snapshot()[_STATE_DICTS[which]],
            class_names=self.loader.class_names,
            spec=self.spec,
            about={"version": __version__, "epoch": result.epoch, "weights": which, "metrics": values},
        )
