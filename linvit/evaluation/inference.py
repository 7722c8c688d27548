"""Run a trained classifier: its input and precision, batches that fit in memory, test-time augmentation."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from linvit.data.augment.build import InputSpec, resolve_input
from linvit.data.loader import Batch, Loader
from linvit.data.options import InputOptions
from linvit.data.sources.classes import read_class_map
from linvit.device import autocast, autocast_dtype
from linvit.evaluation.options import ClassifierOptions, SourceOptions
from linvit.model.build import TimmModel
from linvit.model.description import model_digest
from linvit.runs.folder import Classifier, load_classifier
from linvit.runtimes.model import ExportedModel, is_exported, open_exported
from linvit.settings.fields import validate

# Options of a command that override the run's settings of the same names.
OVERRIDES = {"crop_pct", "crop_mode", "mean", "std", "interpolation", "input_range", "amp", "amp_dtype"}

Settings = TypeVar("Settings", bound=BaseModel)
Flips = Literal["none", "hflip"]


def override_settings(classifier: Classifier, options: BaseModel) -> Classifier:
    """The classifier with the OVERRIDES that `options` sets in place of its run's settings."""
    given = options.model_dump(include=OVERRIDES, exclude_unset=True, exclude_none=True)
    return replace(classifier, settings={**classifier.settings, **given})


def load_source(
    source: str,
    options: ClassifierOptions,
    *,
    weights: Literal["best", "last"],
    img_size: tuple[int, int] | None,
    class_map: Path | None = None,
) -> Classifier:
    """The classifier that a command names, with the options' overrides and the class names in `class_map`.

    Raises ValueError if `source` cannot be loaded, or has other classes than `class_map`.
    """
    if is_exported(source):
        _check_exported(source, options)
        classifier = open_exported(source, img_size=img_size, device=options.device, trust_code=options.trust_code)
        _check_preparation(classifier, options)
    else:
        classifier = load_classifier(
            source,
            weights=weights,
            img_size=img_size,
            model_name=options.model,
            model_kwargs=options.model_kwargs,
            use_ema=options.use_ema,
        )
    classifier = override_settings(classifier, options)
    return classifier if class_map is None else add_class_names(classifier, read_class_map(class_map), source=source)


def open_source(options: SourceOptions) -> Classifier:
    """The classifier that a command's options name, as `load_source` does."""
    return load_source(
        options.source, options, weights=options.weights, img_size=options.size, class_map=options.class_map
    )


def _check_exported(source: str, options: ClassifierOptions) -> None:
    """Raise ValueError for options that concern weights or precision, which an exported model has fixed."""
    for flag, is_given in (
        ("--model", options.model is not None),
        ("--model-kwargs", bool(options.model_kwargs)),
        ("--use-ema", options.use_ema),
        ("--amp", options.amp),
    ):
        if is_given:
            raise ValueError(
                f"{flag}: {source} is an exported model, which is fixed; remove the option or export again"
            )


def _check_preparation(classifier: Classifier, options: ClassifierOptions) -> None:
    assert isinstance(classifier.model, ExportedModel)
    if classifier.model.metadata.input == "uint8" and not (options.mean is options.std is None):
        raise ValueError(f"--mean and --std: {classifier.weights} normalises images itself; remove the options")


def add_class_names(classifier: Classifier, names: Sequence[str], *, source: str) -> Classifier:
    """The classifier with the class names of `--class-map`; ValueError if it has other names or another number."""
    num_classes = classifier.model.num_classes
    if len(names) != num_classes:
        raise ValueError(f"--class-map names {len(names)} classes, but {source} has {num_classes}; name each class")
    if classifier.class_names not in (None, list(names)):
        raise ValueError(f"--class-map: {source} has class names of its own; remove the option")
    return replace(classifier, class_names=list(names))


def check_classifier(classifier: Classifier) -> None:
    """Raise ValueError for a model that has no classes."""
    if not classifier.model.num_classes:
        raise ValueError(
            f"{classifier.weights} is a model without a classifier (num_classes=0), which predicts nothing; give one "
            "with classes"
        )


def names_of_classes(classifier: Classifier) -> list[str]:
    """The classifier's class names, or its labels as text; ValueError unless there is one for each of its classes."""
    check_classifier(classifier)
    num_classes = classifier.model.num_classes
    names = classifier.class_names or [str(label) for label in range(num_classes)]
    if len(names) != num_classes:
        raise ValueError(
            f"{classifier.weights} has {num_classes} classes, but {len(names)} names; give one name per class"
        )
    return names


def input_spec(classifier: Classifier, *, img_size: tuple[int, int] | None = None) -> InputSpec:
    """Preprocessing of images: the run's settings, else the model's own.

    Args:
        img_size: (height, width) in pixels; by default the model's current size, whatever the run's was.

    Raises ValueError for an invalid setting and for a model that does not take RGB.
    """
    settings = _settings(classifier, InputOptions)
    return resolve_input(classifier.model, settings.model_copy(update={"img_size": img_size}))


def source_digest(model: TimmModel) -> str | None:
    """The SHA-256 of a model with its weights, see `model_digest`; None if unknown.

    An exported model has that of the model that it was exported from, and quantised weights have one of their own.
    """
    if isinstance(model, ExportedModel):
        return model.metadata.weights
    return model_digest(model)


def fingerprint(classifier: Classifier, spec: InputSpec) -> str | None:
    """A digest of the model and of how images are prepared, which together determine its outputs; None if unknown."""
    digest = source_digest(classifier.model)
    if digest is None:
        return None
    return hashlib.sha256(json.dumps([digest, asdict(spec)]).encode()).hexdigest()


def amp_precision(classifier: Classifier) -> torch.dtype | None:
    """The precision of automatic mixed precision in the run's settings; None disables it."""
    settings = _settings(classifier, _RunSettings)
    return autocast_dtype(settings.amp, settings.amp_dtype)


def run_batch_size(classifier: Classifier) -> int | None:
    """The batch size that the run evaluated with; None if unknown."""
    settings = _settings(classifier, _RunSettings)
    size = settings.validation_batch_size or settings.batch_size
    return size if isinstance(size, int) else None


class _RunSettings(BaseModel):
    """Settings of a run that matter to evaluation, besides those of the input."""

    amp: bool = False
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    validation_batch_size: Annotated[int, Field(gt=0)] | None = None


def _settings(classifier: Classifier, kind: type[Settings]) -> Settings:
    """The run's settings that `kind` has; ValueError, naming the setting, if a file contains a wrong value."""
    given = {name: value for name, value in classifier.settings.items() if name in kind.model_fields}
    given = {name: value for name, value in given.items() if value is not None}
    return validate(kind, given, source=lambda name: f"settings of the run that saved {classifier.weights}: ")


class BatchForward:
    """A model's logits, batch by batch. When a batch does not fit in memory, the batch size is halved for good.

    Args:
        model: in evaluation mode, on `device`.
        amp_dtype: precision of automatic mixed precision; None disables it.
        log: called with a sentence when the batch size is halved.

    Attributes:
        size: maximum number of images per forward pass; None while every batch fitted.
    """

    def __init__(
        self, model: nn.Module, *, device: torch.device, amp_dtype: torch.dtype | None, log: Callable[[str], object]
    ) -> None:
        self.model = model
        self.device = device
        self.amp_dtype = amp_dtype
        self.log = log
        self.size: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, C) in float32 for images (B, 3, H, W); ValueError if a single image does not fit in memory."""
        logits = self._try(images)
        while logits is None:
            self._halve(images)
            logits = self._try(images)
        return logits

    # Gradients are disabled here, not around the caller's loop: inside a generator they would stay disabled for the
    # generator's user.
    @torch.no_grad()
    def _try(self, images: Tensor) -> Tensor | None:
        try:
            with autocast(self.device, self.amp_dtype):
                return torch.cat([self.model(part).float() for part in images.split(self.size or len(images))])
        except torch.OutOfMemoryError:
            return None

    def _halve(self, images: Tensor) -> None:
        before = min(self.size or len(images), len(images))
        if before == 1:
            height, width = images.shape[-2:]
            raise ValueError(
                f"a single image of {height}×{width} px does not fit in the memory of {self.device}; use a smaller "
                "--img-size, --amp or --device cpu"
            )
        self.size = (before + 1) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.log(f"out of memory with {before} images at once; continuing with {self.size}")


class ShardedForward:
    """Logits from a model whose weights are sharded; in an evaluation, all processes make the same number of calls.

    Each call gathers the weights block by block, for which all processes wait. One with fewer batches than others makes
    up for it with blank images.

    Args:
        model: in evaluation mode.
        amp_dtype: precision of automatic mixed precision; None is off.
        num_calls: the number of calls, of any process at most.
    """

    def __init__(
        self, model: nn.Module, *, device: torch.device, amp_dtype: torch.dtype | None, num_calls: int
    ) -> None:
        self.model, self.device, self.amp_dtype = model, device, amp_dtype
        self._calls_left = num_calls

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, C) in float32 of images (B, 3, H, W); ValueError if the batch does not fit in memory."""
        self._calls_left -= 1
        try:
            # As without sharding, compiled blocks are for training alone: figures must not depend on the compiler.
            with autocast(self.device, self.amp_dtype), torch.compiler.set_stance("force_eager"):
                logits: Tensor = self.model(images)
            return logits.float()
        except torch.OutOfMemoryError as error:
            # Halves would be calls that the other processes do not make.
            raise ValueError(
                f"memory ran out while evaluating {len(images)} images at once with sharded weights: set a lower "
                "--validation-batch-size"
            ) from error

    def finish(self, img_size: tuple[int, int]) -> None:
        """Make the calls that are left, on a blank image of that (height, width), and shard all weights again."""
        for _ in range(self._calls_left):
            self(torch.zeros(1, 3, *img_size, device=self.device))
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # Outside of training the outermost module keeps its weights gathered.
                module.reshard()


def forward_views(
    forwards: Sequence[Callable[[Tensor], Tensor]], loaders: Sequence[Loader], *, flips: Flips
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of the first loader with their logits (B, C), or the log of the mean probability over several views.

    Args:
        forwards: one function from images to logits per loader.
        loaders: the same images, at one size per loader.
        flips: whether to add the mirror image of each.
    """
    for batches in zip(*loaders, strict=True):
        assert all(torch.equal(batch.indices, batches[0].indices) for batch in batches)
        if not len(batches[0].images):
            yield batches[0], torch.empty(0)
            continue
        views = []
        for forward, batch in zip(forwards, batches):
            views.append(forward(batch.images))
            if flips == "hflip":
                views.append(forward(batch.images.flip(3)))
        yield batches[0], views[0] if len(views) == 1 else mean_log_probability(views)


def mean_log_probability(views: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean probability over several views, from the logits of each, (B, C)."""
    stacked = torch.stack([view.float().log_softmax(1) for view in views])
    return stacked.logsumexp(0) - math.log(len(views))


def scaled_size(size: tuple[int, int], scale: float, *, multiple: int) -> tuple[int, int]:
    """A (height, width) times `scale`, each side rounded to the nearest positive multiple of `multiple`."""
    height, width = (max(round(side * scale / multiple), 1) * multiple for side in size)
    return height, width
