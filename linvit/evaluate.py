"""Evaluation on a folder of images: during training and by `linvit eval`, one and the same."""

import copy
import json
import platform
import time
from collections.abc import Sequence
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.layers import PatchEmbed
from torch import nn

import linvit
from linvit.data.folder import ImageFolder, open_folder
from linvit.data.loader import Loader, create_eval_loader
from linvit.data.options import InputOptions
from linvit.data.transforms import InputSpec, resolve_input
from linvit.evaluate_options import EvalOptions
from linvit.files import write_text
from linvit.runs import Classifier, load_classifier
from linvit.training.distributed import choose_device, sum_over_ranks, usable_workers
from linvit.training.metrics import ImageRecords, Metrics
from linvit.training.precision import autocast, autocast_dtype
from linvit.validation import listed

DEFAULT_BATCH_SIZE = 64
MOST_CLASSES_SHOWN = 20


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, *, device: torch.device, amp_dtype: torch.dtype | None = None
) -> Metrics:
    """Metrics of a model over all images of a loader, and of the loaders of all other processes.

    Args:
        model: left in the mode that it was in; a copy is evaluated where it lies on another device.
        loader: from `create_eval_loader`, its images on `device`.
        amp_dtype: precision of automatic mixed precision; None is off.
    """
    if next(model.parameters()).device != device:
        model = copy.deepcopy(model).to(device)
    num_images = sum_over_ranks(torch.tensor(loader.num_images, device=device)).item()
    records = ImageRecords(int(num_images), device)
    was_training = model.training
    model.eval()
    for batch in loader:
        records.add_unreadable(batch.unreadable)
        if not len(batch.images):
            continue
        with autocast(device, amp_dtype):
            logits = model(batch.images)
        records.add(batch.indices, logits, batch.labels)
    model.train(was_training)
    return records.compute(loader.class_names)


def evaluate_command(options: EvalOptions) -> int:
    """`linvit eval`: evaluate at each size asked for, show a table and write JSON; returns the exit status.

    Raises ValueError where source, data or options do not fit together.
    """
    sizes: list[tuple[int, int] | None] = [(size, size) if isinstance(size, int) else size for size in options.img_size]
    results = [_evaluate_at(size, options) for size in sizes or [None]]
    _show(results)
    if options.json_file is not None:
        # One size gives an object, several a list of them.
        write_text(options.json_file, json.dumps(results if len(results) > 1 else results[0], indent=2) + "\n")
    return 0


def _evaluate_at(size: tuple[int, int] | None, options: EvalOptions) -> dict[str, Any]:
    classifier = load_classifier(
        options.source,
        weights=options.weights,
        img_size=size,
        model_name=options.model,
        model_kwargs=options.model_kwargs,
        use_ema=options.use_ema,
    )
    device = torch.device(choose_device(options.device))
    model = classifier.model
    model.to(device)
    spec = resolve_input(model, _input_options(classifier, options, size))
    dataset = _open_data(classifier, options)
    loader = _create_loader(dataset, classifier, spec, options, device)
    started = time.perf_counter()
    metrics = evaluate(model, loader, device=device, amp_dtype=_precision(classifier, options))
    seconds = time.perf_counter() - started
    return {
        "model": model.pretrained_cfg["architecture"],
        "weights": classifier.weights,
        "data": str(options.data_dir),
        "split": options.split,
        "labels": "by name" if classifier.class_names is not None else "by order",
        "img_size": spec.size[0] if spec.size[0] == spec.size[1] else list(spec.size),
        "num_tokens": num_patches(model, spec.size),
        "top1": metrics.top1,
        "top5": metrics.top5,
        "loss": metrics.loss,
        "num_images": metrics.num_images,
        "num_unreadable": len(metrics.unreadable),
        "unreadable": [str(dataset.path(index)) for index in metrics.unreadable],
        "images_per_second": metrics.num_images / seconds,
        "per_class": metrics.per_class,
        "images_per_class": metrics.images_per_class,
        "device": str(device),
        "versions": {
            "linvit": linvit.__version__,
            "timm": timm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _input_options(classifier: Classifier, options: EvalOptions, size: tuple[int, int] | None) -> InputOptions:
    """How images are prepared: as the options say, else as the run did, else as the model says itself."""
    settings = {name: classifier.settings.get(name) for name in InputOptions.model_fields}
    names = ("crop_pct", "crop_mode", "mean", "std", "interpolation")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return InputOptions(**{**settings, **given, "img_size": size})


def _open_data(classifier: Classifier, options: EvalOptions) -> ImageFolder:
    # timm's own models know ImageNet's classes, of which a folder may well hold a few only.
    is_timm_name = classifier.weights == options.source
    dataset = open_folder(
        options.data_dir,
        split=options.split,
        class_names=classifier.class_names,
        missing_classes="allow" if is_timm_name else "refuse",
    )
    num_classes = classifier.model.num_classes
    if len(dataset.class_names) != num_classes:
        raise ValueError(
            f"{options.source} has {num_classes} classes without names, but {dataset.root} holds "
            f"{len(dataset.class_names)}; evaluate a run's folder, which knows its classes' names"
        )
    return dataset


def _create_loader(
    dataset: ImageFolder, classifier: Classifier, spec: InputSpec, options: EvalOptions, device: torch.device
) -> Loader:
    settings = classifier.settings
    of_run = settings.get("validation_batch_size") or settings.get("batch_size", DEFAULT_BATCH_SIZE)
    return create_eval_loader(
        dataset,
        spec,
        batch_size=options.batch_size or of_run,
        workers=usable_workers(options.workers),
        device=device,
        pin_memory=device.type == "cuda",
        on_bad_image=options.on_bad_image,
    )


def _precision(classifier: Classifier, options: EvalOptions) -> torch.dtype | None:
    """The run's own precision, where the options do not say another."""
    given = options.model_dump(include={"amp", "amp_dtype"}, exclude_unset=True)
    chosen = {"amp": options.amp, "amp_dtype": options.amp_dtype, **classifier.settings, **given}
    return autocast_dtype(chosen["amp"], chosen["amp_dtype"])


def num_patches(model: nn.Module, size: tuple[int, int]) -> int | None:
    """Patches that a ViT cuts an image of that size into, prefix tokens not counted; None for other models."""
    embedding = getattr(model, "patch_embed", None)
    if not isinstance(embedding, PatchEmbed):
        return None
    height, width = embedding.dynamic_feat_size(size)
    return int(height * width)


def _show(results: Sequence[dict[str, Any]]) -> None:
    console = Console()
    table = Table("size", "patches", "top-1 %", "top-5 %", "loss", "images", "images/s")
    for result in results:
        size = result["img_size"]
        table.add_row(
            str(size) if isinstance(size, int) else f"{size[0]}×{size[1]}",
            str(result["num_tokens"]),
            f"{result['top1']:.3f}",
            f"{result['top5']:.3f}",
            f"{result['loss']:.4f}",
            str(result["num_images"]),
            f"{result['images_per_second']:.1f}",
        )
    console.print(f"{results[0]['model']} ({results[0]['weights']}) on {results[0]['data']}, {results[0]['split']}")
    console.print(table)
    if results[0]["labels"] == "by order":
        console.print("the weights do not name their classes: folders, sorted by name, were taken for labels 0, 1, ...")
    _show_unreadable(console, results[-1])
    _show_classes(console, results[-1])


def _show_unreadable(console: Console, result: dict[str, Any]) -> None:
    names = result["unreadable"]
    if names:
        of_all = f"{len(names)} of {len(names) + result['num_images']} images cannot be read and are not counted"
        console.print(f"{of_all}: {listed(names)}", soft_wrap=True, markup=False)


def _show_classes(console: Console, result: dict[str, Any]) -> None:
    """Accuracy per class, the worst first."""
    accuracies = {name: accuracy for name, accuracy in result["per_class"].items() if accuracy is not None}
    table = Table("class", "images", "top-1 %")
    for name in sorted(accuracies, key=lambda name: accuracies[name])[:MOST_CLASSES_SHOWN]:
        table.add_row(name, str(result["images_per_class"][name]), f"{accuracies[name]:.2f}")
    console.print(table)
    if len(accuracies) > MOST_CLASSES_SHOWN:
        console.print(f"the {MOST_CLASSES_SHOWN} worst of {len(accuracies)} classes; --json FILE has them all")
