"""Run `linvit probe`: features, penalty, classifier, validation, and the folder of the run."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from linvit.data.loader import Loader, create_eval_loader
from linvit.data.sources.base import ImageSet
from linvit.data.sources.open import paths_of_split
from linvit.device import choose_device
from linvit.distributed import usable_workers
from linvit.evaluation.inference import amp_precision, input_spec, load_source, run_batch_size
from linvit.evaluation.metrics import ImageRecords, ImageResults
from linvit.evaluation.predictions import write_predictions
from linvit.evaluation.scores import scorer
from linvit.evaluation.source import DEFAULT_BATCH_SIZE
from linvit.evaluation.uncertainty import bootstrap
from linvit.measure.provenance import provenance
from linvit.model.build import TimmModel
from linvit.output.cells import markdown_cell
from linvit.output.files import cannot_write, printable, scratch_of, write_json, write_text
from linvit.output.terminal import format_duration, format_size, page, progress_bar, show_line, table
from linvit.probe.features import Features, View, facts_of, image_features
from linvit.probe.head import NUM_FOLDS, PENALTIES, Choice, Head, choose_penalty, fit_head
from linvit.probe.options import ProbeOptions
from linvit.runs.folder import RunFolder, save_classifier, source_files
from linvit.runtimes.model import is_exported
from linvit.settings.fields import height_and_width
from linvit.settings.flags import UsageError, check_files, check_folder
from linvit.settings.yaml import write_settings
from linvit.training.setup import open_train_set, open_val_set
from linvit.training.summary import write_summary
from linvit.version import __version__

NUM_RESAMPLES = 1000


def probe_command(options: ProbeOptions, *, command: str) -> int:
    """Train and validate a classifier, and write the run; returns the exit status. `command` is in the results.

    Raises UsageError or ValueError if model, options and images do not fit together, OSError if files cannot be
    written.
    """
    assert options.data_dir is not None
    if options.output.exists():
        raise UsageError(f"--output {options.output} exists already: choose another folder")
    if is_exported(options.source):
        raise UsageError(f"{options.source} is an exported model, whose classifier cannot be replaced: give the run")
    if options.output.absolute() == options.features_folder.absolute():
        raise UsageError(f"--output {options.output} would be the folder of the features, too: choose another name")
    check_folder("--output", options.output)
    check_folder("--features-dir", options.features_folder)
    splits = [] if options.val_fraction else [options.train_split, options.val_split]
    images = [path for split in splits for path in paths_of_split(options.data_dir, split)] or [options.data_dir]
    check_files(("--json", options.json_file), inputs=[*source_files(options.source), *images])
    console = page(outputs=[options.json_file])
    device = torch.device(choose_device(options.device))
    train_set = open_train_set(options)
    val_set = open_val_set(options, class_names=train_set.class_names)
    for text in filter(None, dict.fromkeys((train_set.note, val_set.note))):
        show_line(console, text)
    if len(train_set.class_names) < 2:
        raise ValueError(f"{options.data_dir} has the class {train_set.class_names[0]!r} only; a classifier needs two")
    _Probe(options, device, train_set, val_set, console, command).run()
    return 0


@dataclass(frozen=True)
class Trained:
    """The classifier of a probe, how its penalty was chosen, and its results on the validation images."""

    head: Head
    choice: Choice
    train_loss: float
    results: ImageResults


class _Probe:
    """The stages of one probe, with the model and the images that they share."""

    def __init__(
        self,
        options: ProbeOptions,
        device: torch.device,
        train_set: ImageSet,
        val_set: ImageSet,
        console: Console,
        command: str,
    ) -> None:
        self.options, self.device, self.console, self.command = options, device, console, command
        self.train_set, self.val_set = train_set, val_set
        size = None if options.img_size is None else height_and_width(options.img_size)
        self.classifier = load_source(options.source, options, weights=options.weights, img_size=size)
        self.model = self.classifier.model.to(device)
        self.spec = input_spec(self.classifier, img_size=size)
        self.amp_dtype = amp_precision(self.classifier)
        self.batch_size = options.batch_size or run_batch_size(self.classifier) or DEFAULT_BATCH_SIZE
        # Before any work: whether the model can carry the classifier.
        _new_head(self.model, len(train_set.class_names), options.source)
        _reset_classifier(self.model, 0)

    def run(self) -> None:
        facts = facts_of(self.model, self.spec, self.amp_dtype)
        with progress_bar() as self.bar:
            views: list[View] = ["image", "mirrored"] if self.options.flip else ["image"]
            train = self._features("training", self.train_set, facts, views)
            (val,) = self._features("validation", self.val_set, facts, ["image"])
            trained = self._train(train, val)
        self._write(trained)
        report = self._report(trained)
        if self.options.json_file is not None:
            write_json(self.options.json_file, report)
        self._show(report, trained.choice)

    def _features(self, name: str, images: ImageSet, facts: dict[str, Any], views: list[View]) -> list[Features]:
        folder = self.options.features_folder
        task = self.bar.add_task(f"features of {name} images", total=len(images))
        started = time.perf_counter()
        features, reused = image_features(
            self.model,
            images,
            views,
            folder=folder,
            facts=facts,
            create_loader=lambda: self._loader(images),
            amp_dtype=self.amp_dtype,
            advance=lambda count: self.bar.advance(task, count),
        )
        how = "reused" if reused else f"computed in {format_duration(time.perf_counter() - started)}"
        num_read = int(features[0].readable.sum())
        lost = f" ({len(images) - num_read:,} cannot be read)" if num_read < len(images) else ""
        show_line(
            self.console,
            f"{num_read:,} {name} images{lost} at {format_size(self.spec.size)} px, {features[0].values.shape[1]} "
            f"features each: {how}, in {folder}",
        )
        return features

    def _loader(self, images: ImageSet) -> Loader:
        return create_eval_loader(
            images,
            self.spec,
            batch_size=self.batch_size,
            workers=usable_workers(self.options.workers),
            device=self.device,
            pin_memory=self.device.type == "cuda",
            on_bad_image=self.options.on_bad_image,
        )

    def _train(self, train: list[Features], val: Features) -> Trained:
        readable = train[0].readable
        labels = torch.tensor(self.train_set.labels)[readable].to(self.device)
        views = [features.values[features.readable].to(self.device) for features in train]
        num_classes = len(self.train_set.class_names)
        task = self.bar.add_task("choosing the penalty", total=NUM_FOLDS * len(PENALTIES))
        choice = choose_penalty(
            views,
            labels,
            num_classes=num_classes,
            seed=self.options.seed,
            advance=lambda: self.bar.advance(task),
        )
        rows, repeated = torch.cat(views), labels.repeat(len(views))
        head = fit_head(rows, repeated, num_classes=num_classes, penalty=choice.penalty)
        train_loss = float(nn.functional.cross_entropy(head.logits(views[0]).double(), labels))
        return Trained(head, choice, train_loss, self._results(head, val))

    def _results(self, head: Head, val: Features) -> ImageResults:
        records = ImageRecords(len(self.val_set), torch.device("cpu"))
        indices = val.readable.nonzero().flatten()
        labels = torch.tensor(self.val_set.labels)[indices]
        records.add(indices, head.logits(val.values[indices].to(self.device)).cpu(), labels)
        records.add_unreadable((~val.readable).nonzero().flatten().tolist())
        return records.gather()

    def _write(self, trained: Trained) -> None:
        options, class_names = self.options, self.train_set.class_names
        layer = _new_head(self.model.cpu(), len(class_names), options.source)
        with torch.no_grad():
            layer.weight.copy_(trained.head.weight)
            layer.bias.copy_(trained.head.bias)
        metrics = trained.results.metrics(class_names)
        values = {"top1": metrics.top1, "top5": metrics.top5, "loss": metrics.loss}
        about = {"version": __version__, "epoch": 0, "weights": "raw", "metrics": values}
        run = RunFolder(scratch_of(options.output))
        shutil.rmtree(run.path, ignore_errors=True)
        try:
            run.path.mkdir(parents=True)
            for folder in (run.best, run.last):
                save_classifier(folder, self.model, class_names=class_names, spec=self.spec, about=about)
            write_settings(run.args, self._settings())
            row = {"epoch": 0, "train_loss": trained.train_loss}
            write_summary(run.summary, [row | {f"eval_{name}": value for name, value in values.items()}])
            write_predictions(run.predictions, trained.results, self.val_set)
            write_text(run.card, self._card(trained))
            run.path.rename(options.output)
        except OSError as error:
            raise cannot_write(options.output, error) from error
        finally:
            shutil.rmtree(run.path, ignore_errors=True)

    def _settings(self) -> dict[str, Any]:
        """The options with what the source's own run decided, so that the new run is evaluated in the same way."""
        return {
            **self.options.model_dump(mode="json", exclude={"json_file"}),
            "img_size": list(self.spec.size),
            "input_range": None if self.spec.input_range is None else list(self.spec.input_range),
            "amp": self.amp_dtype is not None,
            "amp_dtype": str(self.amp_dtype or torch.bfloat16).removeprefix("torch."),
            "batch_size": self.batch_size,
        }

    def _report(self, trained: Trained) -> dict[str, Any]:
        class_names, choice = self.train_set.class_names, trained.choice
        metrics = trained.results.metrics(class_names)
        score = scorer(trained.results, num_classes=len(class_names))
        num_images = metrics.num_images
        return {
            **provenance(self.command, seed=self.options.seed, n=1),
            "source": self.options.source,
            "model": self.model.pretrained_cfg["architecture"],
            "weights": self.classifier.weights,
            "img_size": list(self.spec.size),
            "data": str(self.options.data_dir),
            "num_train": len(self.train_set),
            "num_images": num_images,
            "num_classes": len(class_names),
            "num_features": trained.head.weight.shape[1],
            "flip": self.options.flip,
            "penalty": choice.penalty,
            "num_folds": choice.num_folds,
            "held_out_losses": {f"{penalty:g}": loss for penalty, loss in choice.losses.items()},
            **score(np.ones(num_images)),
            "top1": metrics.top1,
            "top5": metrics.top5,
            "loss": metrics.loss,
            "per_class": metrics.per_class,
            "confidence": bootstrap(score, num_images, num_resamples=NUM_RESAMPLES, seed=self.options.seed),
        }

    def _show(self, report: dict[str, Any], choice: Choice) -> None:
        show_line(
            self.console,
            f"L2 penalty {choice.penalty:g}: the lowest held-out loss, {choice.loss:.4f}, of {len(choice.losses)} "
            f"penalties on {choice.num_folds} {'parts' if choice.num_folds > 1 else 'part'} of the training images",
        )
        rows = table(["images", "top-1 %", "95 % CI", "top-5 %", "F1 %", "ECE %", "loss"], title="validation")
        low, high = report["confidence"]["top1"]
        rows.add_row(
            f"{report['num_images']:,}",
            f"{report['top1']:.2f}",
            f"{low:.1f}–{high:.1f}",
            f"{report['top5']:.2f}",
            f"{report['macro_f1']:.2f}",
            f"{report['ece']:.2f}",
            f"{report['loss']:.4f}",
        )
        self.console.print(rows)
        show_line(self.console, f"run: {self.options.output}")

    def _card(self, trained: Trained) -> str:
        metrics = trained.results.metrics(self.train_set.class_names)
        name = printable(self.options.output.name)
        data = markdown_cell(printable(Path(str(self.options.data_dir)).resolve().name))
        return f"""\
---
library_name: timm
pipeline_tag: image-classification
---
# A linear probe of {markdown_cell(printable(self.options.source))} on {data}

| | |
|---|---|
| top-1 | {metrics.top1:.2f} % |
| loss | {metrics.loss:.4f} |
| evaluated on | {metrics.num_images:,} images of `{self.options.val_split}`, which chose nothing |
| features | {trained.head.weight.shape[1]} per image at {format_size(self.spec.size)} px, not trained |
| classifier | logistic regression, L2 penalty {trained.head.penalty:g} |

    linvit eval {name} DATA

linvit {__version__}
"""


def _reset_classifier(model: TimmModel, num_classes: int) -> None:
    reset: Any = model.reset_classifier
    reset(num_classes)


def _new_head(model: TimmModel, num_classes: int, source: str) -> nn.Linear:
    """A new classifier in the model; ValueError unless it is one linear layer with a bias."""
    _reset_classifier(model, num_classes)
    head = model.get_classifier()
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise ValueError(f"{source} has no single linear classifier with a bias, so a probe cannot be saved in it")
    return head
