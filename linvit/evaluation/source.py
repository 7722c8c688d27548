"""Evaluate one source (a run, a checkpoint or a timm model) at one image size."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from linvit.data.augment.build import InputSpec
from linvit.data.loader import Loader, create_eval_loader
from linvit.data.sources.base import ImageSet
from linvit.data.sources.classes import classes_in_order
from linvit.data.sources.open import open_fraction, open_images
from linvit.distributed import Ranks, usable_workers
from linvit.evaluation.classes import ClassMatch, match_classes
from linvit.evaluation.collect import Collected, collect
from linvit.evaluation.conformal import ConformalRule, assess, calibrate
from linvit.evaluation.inference import (
    add_class_names,
    amp_precision,
    check_classifier,
    fingerprint,
    input_spec,
    load_source,
    run_batch_size,
    scaled_size,
)
from linvit.evaluation.options import EvalOptions
from linvit.evaluation.scores import MOST_CLASSES, calibration, fit_temperature, imagenet_numbers, random_halves
from linvit.model.build import TimmModel
from linvit.output.terminal import format_bytes, note, progress_bar
from linvit.runs.folder import Classifier

DEFAULT_BATCH_SIZE = 64
# With --tta-scales, sizes of models other than ViTs are rounded to multiples of this, the stride of most CNNs.
USUAL_STRIDE = 32
# Memory limit for the logits that fitting a temperature needs.
MOST_LOGIT_BYTES = 8 * 2**30

Size = tuple[int, int]


class MatchedImages(ImageSet):
    """The images of a data set whose classes a model knows, with the model's labels.

    Args:
        images: the data set whose classes were matched.
        match: the model's label for each of its classes.

    Attributes:
        original_indices: index of each image in `images`, ascending, (N,).
    """

    def __init__(self, images: ImageSet, match: ClassMatch) -> None:
        labels = np.array([-1 if label is None else label for label in match.labels])[np.asarray(images.labels)]
        self._images = images
        self.original_indices = np.flatnonzero(labels >= 0)
        super().__init__(
            images.root,
            split=images.split,
            class_names=match.class_names,
            labels=labels[self.original_indices],
            note=images.note,
        )

    def path(self, index: int) -> Path:
        return self._images.path(int(self.original_indices[index]))

    def read_bytes(self, index: int) -> bytes:
        return self._images.read_bytes(int(self.original_indices[index]))


@dataclass(frozen=True)
class Evaluation:
    """A source evaluated at one size; the same in all processes."""

    source: str
    # Architecture, and the file or model name of the weights.
    model: str
    weights: str
    device: str
    size: Size
    # Number of patches; None for models other than ViTs.
    num_tokens: int | None
    # (height, width) of every view; several with `--tta-scales`.
    sizes: list[Size]
    images: ImageSet
    match: ClassMatch
    collected: Collected
    seconds: float
    calibration: dict[str, Any] | None
    # The rule of `--conformal` and how it does.
    conformal: tuple[ConformalRule, dict[str, Any]] | None
    # Number of each image in ImageNet's validation set, with `--real-labels`.
    numbers: list[int] | None

    @property
    def data_indices(self) -> Tensor:
        """Index of each evaluated image in the data, independent of the classes that the model knows; (N,)."""
        indices = self.collected.results.indices
        if isinstance(self.images, MatchedImages):
            return torch.from_numpy(self.images.original_indices)[indices]
        return indices


def evaluate_source(source: str, size: Size | None, options: EvalOptions, ranks: Ranks) -> Evaluation:
    """Evaluate a source at a (height, width), or at its own size if `size` is None.

    Raises ValueError if source, data and options do not fit together.
    """
    classifier = load_source(source, options, weights=options.weights, img_size=size)
    check_classifier(classifier)
    images, match = _open_images(source, classifier, options, split=options.split)
    if options.confusion and len(match.present) > MOST_CLASSES:
        raise ValueError(
            f"--confusion supports at most {MOST_CLASSES:,} classes, not {len(match.present):,}; use --csv instead"
        )
    numbers = imagenet_numbers(images) if options.real_labels else None
    views = _views(classifier, source, size, options, ranks.device)
    evaluator = _Evaluator(options, ranks, classifier, views, match)
    temperature = None if options.temperature == "fit" else options.temperature
    if options.temperature_split is not None:
        split_images, _ = _open_images(source, classifier, options, split=options.temperature_split)
        temperature = evaluator.fit_temperature(split_images)
    calibration_set = None
    if options.conformal_split is not None:
        split_images, _ = _open_images(source, classifier, options, split=options.conformal_split)
        calibration_set = evaluator.collect(split_images, keep_logits=True)
    started = time.perf_counter()
    keep_logits = options.temperature is not None or options.conformal is not None
    collected = evaluator.collect(images, keep_logits=keep_logits)
    seconds = time.perf_counter() - started
    model, spec = views[0]
    return Evaluation(
        source=source,
        model=model.pretrained_cfg["architecture"],
        weights=classifier.weights,
        device=str(ranks.device),
        size=spec.size,
        num_tokens=num_patches(model, spec.size),
        sizes=[spec.size for _, spec in views],
        images=images,
        match=match,
        # Neither logits nor models accumulate over several sources.
        collected=replace(collected, logits=None),
        seconds=seconds,
        calibration=_calibrate(collected, temperature, options),
        conformal=_conform(collected, calibration_set, match, options, classifier, size),
        numbers=numbers,
    )


def _check_finite(collected: Collected, weights: str) -> None:
    """Raise ValueError if the model's output is NaN or infinite for some of the images."""
    results = collected.results
    wrong = ~(results.losses.isfinite() & results.probabilities.isfinite())
    if wrong.any():
        raise ValueError(
            f"{weights}: the model's output is NaN or infinite for {int(wrong.sum()):,} of {len(wrong):,} images; "
            "evaluate in float32 (without --amp), or choose other weights"
        )


@dataclass(frozen=True)
class _Evaluator:
    """A classifier with the model and input of each view."""

    options: EvalOptions
    ranks: Ranks
    classifier: Classifier
    views: list[tuple[TimmModel, InputSpec]]
    match: ClassMatch

    def collect(self, images: ImageSet, *, keep_logits: bool) -> Collected:
        num_bytes = 4 * len(images) * len(self.match.class_names)
        if keep_logits and num_bytes > MOST_LOGIT_BYTES:
            raise ValueError(
                f"--temperature and --conformal keep all logits in memory, {format_bytes(num_bytes)} for "
                f"{len(images):,} images; evaluate fewer images or omit them"
            )
        loaders = [self._loader(images, spec) for _, spec in self.views]
        with progress_bar(is_shown=self.ranks.is_primary) as bar:
            task = bar.add_task("evaluating", total=loaders[0].num_images)
            collected = collect(
                [model for model, _ in self.views],
                loaders,
                device=self.ranks.device,
                amp_dtype=amp_precision(self.classifier),
                log=note,
                flips=self.options.tta,
                present=self.match.present if self.match.is_subset else None,
                num_logits=len(self.match.class_names) if keep_logits else None,
                advance=lambda count: bar.advance(task, count),
            )
        _check_finite(collected, self.classifier.weights)
        return collected

    def fit_temperature(self, images: ImageSet) -> float:
        collected = self.collect(images, keep_logits=True)
        assert collected.logits is not None
        return fit_temperature(collected.logits, collected.results.labels)

    def _loader(self, images: ImageSet, spec: InputSpec) -> Loader:
        return create_eval_loader(
            images,
            spec,
            batch_size=self.options.batch_size or run_batch_size(self.classifier) or DEFAULT_BATCH_SIZE,
            workers=usable_workers(self.options.workers),
            device=self.ranks.device,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            pin_memory=self.ranks.device.type == "cuda",
            on_bad_image=self.options.on_bad_image,
        )


def num_patches(model: nn.Module, size: Size) -> int | None:
    """Number of patches of a ViT for an image of that size, without prefix tokens; None for other models."""
    embedding = getattr(model, "patch_embed", None)
    if not isinstance(embedding, PatchEmbed):
        return None
    height, width = embedding.dynamic_feat_size(size)
    return int(height * width)


def _views(
    classifier: Classifier, source: str, size: Size | None, options: EvalOptions, device: torch.device
) -> list[tuple[TimmModel, InputSpec]]:
    """A model and its input for each image size; the first has the size of the evaluation, if that is among them."""
    base = input_spec(classifier, img_size=size)
    views = [(classifier.model.to(device), base)]
    embedding = getattr(classifier.model, "patch_embed", None)
    multiple = embedding.patch_size[0] if isinstance(embedding, PatchEmbed) else USUAL_STRIDE
    sizes = dict.fromkeys(scaled_size(base.size, scale, multiple=multiple) for scale in options.tta_scales)
    for other in sizes:
        if other != base.size:
            scaled = load_source(source, options, weights=options.weights, img_size=other)
            views.append((scaled.model.to(device), input_spec(scaled, img_size=other)))
    return views[1:] if sizes and base.size not in sizes else views


def _open_images(
    source: str, classifier: Classifier, options: EvalOptions, *, split: str
) -> tuple[ImageSet, ClassMatch]:
    if options.val_fraction is None:
        images = open_images(options.data_dir, split=split, missing_classes="allow")
    else:
        split = split if "split" in options.model_fields_set else "train"
        images = open_fraction(options.data_dir, split=split, fraction=options.val_fraction, part="val")
    match = match_classes(
        images.class_names,
        _model_classes(source, classifier, images.class_names, options),
        num_classes=classifier.model.num_classes,
        model=source,
        data=str(images.root),
        allow_subset=options.allow_subset,
    )
    has_same_classes = match.class_names == images.class_names
    return images if has_same_classes else MatchedImages(images, match), match


def _model_classes(
    source: str, classifier: Classifier, data_classes: Sequence[str], options: EvalOptions
) -> list[str] | None:
    """The classes that the weights name, or else --class-map; None if neither does."""
    if options.class_map is None or (options.compare and classifier.class_names is not None):
        return classifier.class_names
    return add_class_names(classifier, classes_in_order(options.class_map, data_classes), source=source).class_names


def _calibrate(collected: Collected, temperature: float | None, options: EvalOptions) -> dict[str, Any] | None:
    """Loss and ECE at the given temperature, or at one fitted on half of the images and evaluated on the others."""
    if options.temperature is None:
        return None
    results, logits = collected.results, collected.logits
    assert logits is not None
    if temperature is not None:
        split = options.temperature_split
        fitted_on = "given" if split is None else f"split {split}"
        return {"fitted_on": fitted_on, **calibration(results, logits, temperature)}
    if len(results.labels) < 2:
        raise ValueError("--temperature fit needs at least two images, one to fit on and one to evaluate; add images")
    fitted, held_out = random_halves(len(results.labels), seed=options.seed)
    temperature = fit_temperature(logits[fitted], results.labels[fitted])
    values = calibration(results.take(held_out), logits[held_out], temperature)
    return {"fitted_on": f"a random half ({len(fitted)} images)", **values}


def _conform(
    collected: Collected,
    calibration_set: Collected | None,
    match: ClassMatch,
    options: EvalOptions,
    classifier: Classifier,
    size: Size | None,
) -> tuple[ConformalRule, dict[str, Any]] | None:
    """The rule for sets of classes, from `calibration_set` or half of the images, and its results on the others."""
    if options.conformal is None:
        return None
    assert collected.logits is not None
    probabilities, labels = collected.logits.double().softmax(1), collected.results.labels.cpu()
    if calibration_set is not None and calibration_set.logits is not None:
        used, used_labels = calibration_set.logits.double().softmax(1), calibration_set.results.labels.cpu()
        where = f"split {options.conformal_split}"
    else:
        fitted, held_out = random_halves(len(labels), seed=options.seed)
        used, used_labels = probabilities[fitted], labels[fitted]
        probabilities, labels = probabilities[held_out], labels[held_out]
        where = "a random half"
    rule = calibrate(
        used,
        used_labels,
        alpha=options.conformal,
        method=options.conformal_method,
        class_names=match.class_names,
        fingerprint=fingerprint(classifier, input_spec(classifier, img_size=size)),
    )
    return rule, {"calibrated_on": f"{where} ({len(used_labels)} images)", **assess(rule, probabilities, labels)}
