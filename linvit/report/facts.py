"""Settings and cost of a run, as rows of text."""

import copy
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from linvit.data.sources.base import ImageSet
from linvit.evaluation.inference import input_spec
from linvit.evaluation.source import num_patches
from linvit.measure.timing import count_flops
from linvit.output.terminal import format_bytes, format_count, format_duration, format_size
from linvit.report.run import Run
from linvit.runs.folder import Classifier

# Settings about the place of a run, not its training.
_PLACES = ("output", "experiment", "resume", "no_resume_opt", "dry_run", "report")

Facts = list[tuple[str, str]]


def describe_training(run: Run, train_set: ImageSet | None, classifier: Classifier | None) -> Facts:
    """Model, data and main options of a run."""
    setting = run.setting
    classes = f", {len(run.class_names):,} classes" if run.class_names else ""
    images = "" if train_set is None else f", {len(train_set):,} images"
    size = "" if classifier is None else f" at {format_size(input_spec(classifier).size)} px"
    is_probe = setting("source") is not None
    model = f"linear probe of {setting('source')}" if is_probe else setting("model")
    facts = [
        ("Model", f"{model}{size}" + _starting_point(run)),
        ("Trained on", f"{setting('data_dir')}, {setting('train_split')}{images}{classes}"),
    ]
    if run.predictions is not None:
        facts.append(("Evaluated on", f"{setting('val_split')}, {len(run.predictions.paths):,} images"))
    if is_probe:
        rows = "images and their mirror images" if setting("flip") else "images"
        return [*facts, ("Classifier", f"logistic regression on features of the {rows}, seed {setting('seed')}")]
    done = f"{run.num_epochs:,} of {setting('epochs')}"
    last = run.rows[-1]["epoch"] if run.rows else None
    if last is not None and last + 1 != run.num_epochs:
        done = f"{run.num_epochs:,} epochs, up to epoch {last:.0f}, of {setting('epochs')}"
    accumulated = setting("grad_accum_steps") or 1
    batch = f"{setting('batch_size')}" + (f" × {accumulated} accumulated" if accumulated != 1 else "")
    facts += [
        ("Epochs", done),
        ("Optimizer", f"{setting('opt')}, {_lr(run)}, batches of {batch}, {setting('sched')} schedule"),
        ("Augmentation", _augmentation(run)),
        ("Averaged weights (EMA)", f"decay {setting('model_ema_decay')}" if setting("model_ema") else "none"),
        ("Seed", f"{setting('seed')}"),
    ]
    if run.best is not None and "version" in run.best:
        facts.append(("linvit", f"{run.best['version']}"))
    return facts


def _starting_point(run: Run) -> str:
    for name in ("pretrained_path", "initial_checkpoint"):
        if run.setting(name) is not None:
            return f", from {run.setting(name)}"
    return ", from pretrained weights" if run.setting("pretrained") else ""


def _lr(run: Run) -> str:
    if run.setting("lr") is not None:
        return f"learning rate {run.setting('lr')}"
    return f"learning rate {run.setting('lr_base')} per {run.setting('lr_base_size')} images"


def _augmentation(run: Run) -> str:
    setting = run.setting
    if setting("aug_file") is not None:
        return f"{setting('aug_file')}"
    if setting("no_aug"):
        return "none"
    parts = [f"crop {setting('train_crop_mode') or 'rrc'}"]
    names = {
        "hflip": "horizontal flip",
        "vflip": "vertical flip",
        "transpose": "transposition",
        "aa": "",
        "color_jitter": "colour jitter",
        "reprob": "random erasing",
        "mixup": "mixup",
        "cutmix": "cutmix",
        "smoothing": "label smoothing",
        "patch_drop": "patch dropout",
    }
    for option, name in names.items():
        value = setting(option)
        if value:
            text = " ".join(map(str, value)) if isinstance(value, list) else f"{value}"
            parts.append(f"{name} {text}".strip())
    return ", ".join(parts)


def describe_cost(run: Run, classifier: Classifier | None) -> Facts:
    """Time, speed and memory of the training, and size and computation of the model."""
    facts: Facts = []
    seconds, speeds, waits = (run.numbers(name) for name in ("seconds", "images_per_second", "data_wait"))
    if seconds:
        text = f"{format_duration(sum(seconds))} in {len(seconds)} epochs, without evaluation"
        facts.append(("Training time", text))
    if speeds:
        facts.append(("Speed", f"{statistics.median(speeds):,.1f} images/s (median of the epochs)"))
    if waits:
        facts.append(("Waiting for data", f"{100 * statistics.median(waits):.1f} % of the time"))
    memory = run.numbers("peak_memory")
    facts.append(("Peak memory", format_bytes(max(memory)) if memory else "not recorded"))
    if classifier is not None:
        facts += _model_cost(classifier)
    return facts


def _model_cost(classifier: Classifier) -> Facts:
    model, size = classifier.model, input_spec(classifier).size
    facts = [("Parameters", format_count(sum(parameter.numel() for parameter in model.parameters())))]
    patches = num_patches(model, size)
    if patches is not None:
        facts.append(("Patches per image", f"{patches:,}"))
    try:
        bare = copy.deepcopy(model).to("meta")
        image = torch.empty(1, 3, *size, device="meta")
        forward, train = (count_flops(bare, image, mode=mode) for mode in ("forward", "train"))
    except (RuntimeError, NotImplementedError):
        # Not every model of timm runs without values.
        return facts
    text = f"{format_count(forward)}FLOP forward, {format_count(train)}FLOP per training step"
    return [*facts, ("Computation per image", text)]


def settings_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per option: its name, its value in each run, and whether the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [_text(run.settings.get(name)) for run in runs]
        rows.append({"name": name, "values": values, "differs": name not in _PLACES and len(set(values)) > 1})
    return rows


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return " ".join(map(_text, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{name}={_text(each)}" for name, each in value.items()) or "–"
    return str(value)
