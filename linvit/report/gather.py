"""Compute for a run's page what its folder does not contain: pictures, heat maps, missing predictions."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from linvit.data.loader import create_eval_loader
from linvit.data.sources.base import ImageSet
from linvit.distributed import usable_workers
from linvit.evaluation.collect import collect
from linvit.evaluation.inference import amp_precision, input_spec, run_batch_size
from linvit.evaluation.predictions import Predictions, predictions_of
from linvit.evaluation.source import DEFAULT_BATCH_SIZE
from linvit.output.files import reason, write_text
from linvit.output.terminal import note, print_line, progress_bar
from linvit.report.examples import AUGMENTED_IMAGES, MOST_WORST, PICTURES_PER_PAGE, augmented_images, worst_images
from linvit.report.facts import describe_cost, describe_training
from linvit.report.page import Evaluated, RunPage, render_runs
from linvit.report.run import Run, read_run
from linvit.runs.folder import Classifier, load_classifier
from linvit.training.config import TrainConfig
from linvit.training.model import epoch_sizes
from linvit.training.setup import open_train_set, open_val_set


@dataclass(frozen=True)
class RunData:
    """The images of a run. Each set is None if it cannot be opened; `missing` then says why."""

    config: TrainConfig | None
    train_set: ImageSet | None
    val_set: ImageSet | None
    missing: str | None = None


def open_data(run: Run, data: Path | None) -> RunData:
    """The images that a run was trained and evaluated on, at their old place or in `data`.

    Raises ValueError if `data` is given and cannot be opened.
    """
    try:
        config = TrainConfig.load(run.folder.args)
        if data is not None:
            config = config.model_copy(update={"data_dir": data})
        train_set = open_train_set(config)
        val_set = open_val_set(config, class_names=run.class_names or train_set.class_names)
    except (ValueError, OSError) as error:
        if data is not None:
            raise ValueError(f"--data: {error}") from error
        return RunData(None, None, None, f"There are no images: the run's data cannot be opened ({reason(error)}).")
    return RunData(config, train_set, val_set)


def gather(run: Run, data: RunData, *, device: torch.device, evaluate: bool, num_runs: int = 1) -> RunPage:
    """The page of a run.

    Args:
        device: where heat maps and predictions are computed.
        evaluate: evaluate the best weights if the folder contains no predictions.
        num_runs: the number of runs on the page, which share the room for pictures.
    """
    classifier, problem = _load(run, device)
    if run.predictions is None and evaluate and classifier is not None and data.val_set is not None:
        run = run.with_predictions(evaluate_images(classifier, data.val_set, device=device))
    evaluated = None
    if run.predictions is not None and run.best is not None:
        most = max(min(MOST_WORST, PICTURES_PER_PAGE // num_runs), 2)
        worst = worst_images(
            run.predictions, data.val_set, classifier, reason_without=data.missing or problem, most=most
        )
        averaged = ", averaged (EMA)" if run.best.get("weights") == "ema" else ""
        subject = f"Weights of epoch {run.best.get('epoch')}{averaged}, on {run.setting('val_split')}"
        evaluated = Evaluated(run.name, subject, run.predictions, worst)
    augmented, augmented_note = [], data.missing
    if data.config is not None and data.train_set is not None and classifier is not None:
        spec = input_spec(classifier)
        # The first epochs may train on smaller images.
        spec = replace(spec, size=next(iter(epoch_sizes(data.config)), spec.size))
        shown = max(AUGMENTED_IMAGES // num_runs, 1)
        augmented = augmented_images(data.train_set, data.config, spec, seed=data.config.seed, most=shown)
    elif data.missing is None:
        augmented_note = problem or "There are no images: they are shown once the run has best weights."
    return RunPage(
        run=run,
        training=describe_training(run, data.train_set, classifier),
        cost=describe_cost(run, classifier),
        evaluated=evaluated,
        augmented=augmented,
        augmented_note=augmented_note,
    )


def _load(run: Run, device: torch.device) -> tuple[Classifier | None, str | None]:
    """The best weights on a device; None and the reason if they cannot be loaded."""
    if run.best is None:
        return None, None
    try:
        classifier = load_classifier(str(run.folder.path))
    except (ValueError, OSError) as error:
        return None, f"The best weights cannot be loaded ({reason(error)})."
    classifier.model.to(device)
    return classifier, None


def evaluate_images(classifier: Classifier, images: ImageSet, *, device: torch.device) -> Predictions:
    """The predictions of a classifier, on its device, for all images of a set, with a progress bar on a terminal."""
    loader = create_eval_loader(
        images,
        input_spec(classifier),
        batch_size=run_batch_size(classifier) or DEFAULT_BATCH_SIZE,
        workers=usable_workers(4),
        device=device,
        on_bad_image="skip",
    )
    with progress_bar() as bar:
        task = bar.add_task("evaluating", total=loader.num_images)
        collected = collect(
            [classifier.model],
            [loader],
            device=device,
            amp_dtype=amp_precision(classifier),
            log=note,
            advance=lambda count: bar.advance(task, count),
        )
    return predictions_of(collected.results, images)


def report_training(
    folder: Path, config: TrainConfig, train_set: ImageSet, val_set: ImageSet, *, device: torch.device
) -> None:
    """Write report.html into the folder of a run that is done; if that fails, print a warning and return."""
    try:
        run = read_run(folder)
        page = gather(run, RunData(config, train_set, val_set), device=device, evaluate=False)
        write_text(run.folder.report, render_runs([page]))
        print_line(f"report: {run.folder.report}")
    # The run is done and its weights are saved, whatever happens here.
    except KeyboardInterrupt:
        note(f"warning: no report was written (interrupted); `linvit report {folder}` tries again")
    except Exception as error:
        note(f"warning: no report was written ({reason(error)}); `linvit report {folder}` tries again")
