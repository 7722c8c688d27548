"""What a run writes and prints while it goes; only the primary process does either."""

from pathlib import Path
from typing import Any

import linvit
from linvit.data.loader import Loader
from linvit.data.transforms import InputSpec
from linvit.runs import RunFolder, save_classifier
from linvit.training.card import write_card
from linvit.training.config import TrainConfig
from linvit.training.engine import TrainStep
from linvit.training.log import say
from linvit.training.state import Progress, changed_settings, collect_state, save_state
from linvit.training.summary import EpochResult, write_summary
from linvit.weights import compact


class Recorder:
    """Fills a run's folder.

    Args:
        folder: the run's, made already.
        config: how it is trained.
        loader: what it is trained on.
        spec: how its images are prepared.
        is_primary: whether this process writes and prints at all.

    Every method raises OSError, naming the file, where something cannot be written; what was there before is kept.
    """

    def __init__(self, folder: Path, *, config: TrainConfig, loader: Loader, spec: InputSpec, is_primary: bool) -> None:
        # Training from args.yaml alone repeats the run; it does not go on with it.
        self.config = config.model_copy(update={"experiment": folder.name, "output": folder.parent, "resume": None})
        self.run = RunFolder(folder)
        self.loader, self.spec, self.is_primary = loader, spec, is_primary

    def say(self, text: str) -> None:
        """Print a line, once."""
        if self.is_primary:
            say(text)

    def begin(
        self,
        step: TrainStep,
        progress: Progress,
        *,
        state: dict[str, Any] | None,
        num_images: tuple[int, int],
        new_parameters: list[str],
    ) -> None:
        """Say what is trained and where it is kept, and write args.yaml.

        Args:
            state: what the run goes on from; None: it begins.
            num_images: to train and to evaluate on.
            new_parameters: those that no given weights cover.
        """
        if not self.is_primary:
            return
        config = self.config
        say(f"run: {self.run.path}")
        say(
            f"data: {config.data_dir}, {len(self.loader.class_names)} classes, {num_images[0]:,} images to train and "
            f"{num_images[1]:,} to evaluate on"
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
        config.save(self.run.args)
        if progress.summary:
            write_summary(self.run.summary, progress.summary)

    def end_epoch(self, result: EpochResult, step: TrainStep, progress: Progress, *, best: str | None) -> None:
        """Write the epoch's row, the raw weights to last/, those named `best` to best/, and the run's state."""
        progress.summary.append(result.row())
        if not self.is_primary:
            return
        say(result.describe() + (f"  best ({best})" if best is not None else ""))
        write_summary(self.run.summary, progress.summary)
        self._save_weights(self.run.last, result, step, "raw")
        if best is not None:
            self._save_weights(self.run.best, result, step, best)
            write_card(
                self.run.card,
                config=self.config,
                class_names=self.loader.class_names,
                img_size=self.spec.size,
                epoch=result.epoch,
                weights=best,
                metrics=result.metrics[best],
            )
        self.save_state(step, progress)

    def end(self, progress: Progress) -> None:
        """Say what came out."""
        if progress.best is not None:
            self.say(f"best {self.config.eval_metric} {progress.best:.4f}; the weights are in {self.run.best}")

    def save_state(self, step: TrainStep, progress: Progress) -> None:
        """Write all that going on from here needs, and delete states that are too old."""
        if not self.is_primary:
            return
        state = collect_state(
            step,
            progress,
            settings=self.config.model_dump(mode="json"),
            class_names=self.loader.class_names,
            num_batches=len(self.loader),
        )
        save_state(self.run.checkpoints, state, keep=self.config.checkpoint_hist, milestones=self.config.save_epochs)

    def _save_weights(self, folder: Path, result: EpochResult, step: TrainStep, which: str) -> None:
        metrics = result.metrics.get(which)
        values = {} if metrics is None else {"top1": metrics.top1, "top5": metrics.top5, "loss": metrics.loss}
        save_classifier(
            folder,
            step.weights[which],
            class_names=self.loader.class_names,
            spec=self.spec,
            about={"version": linvit.__version__, "epoch": result.epoch, "weights": which, "metrics": values},
        )
