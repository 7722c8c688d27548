"""One source at one size: loaded, its classes found in the data, run over all images."""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from linvit.data.augment.build import InputSpec
from linvit.data.loader import Loader, create_eval_loader
from linvit.data.sources.base import ImageSet
from linvit.data.sources.open import open_images
from linvit.distributed import Ranks, usable_workers
from linvit.evaluation.classes import ClassMatch, match_classes
from linvit.evaluation.collect import Collected, RelabelledImages, collect, scaled_size
from linvit.evaluation.confusion import MOST_CLASSES
from linvit.evaluation.inference import amp_precision, input_spec
from linvit.evaluation.options import EvalOptions
from linvit.evaluation.scores import calibration, fit_temperature, halves, image_numbers
from linvit.model.build import TimmModel
from linvit.output.terminal import note
from linvit.runs.folder import Classifier, load_classifier

DEFAULT_BATCH_SIZE = 64
# Sizes of models that are no ViTs are multiples of this, as most convolutional networks want it.
USUAL_STRIDE = 32
# What logits may take that are kept to fit a temperature.
MOST_LOGIT_BYTES = 8 * 2**30

Size = tuple[int, int]


@dataclass(frozen=True)
class Evaluated:
    """A source at a size, and what came out; the same in all processes."""

    source: str
    # Architecture, and where the weights come from.
    model: str
    weights: str
    device: str
    size: Size
    # Patches; None for models that are no ViTs.
    num_tokens: int | None
    # (height, width) of every view, more than one with `--tta-scales`.
    sizes: list[Size]
    images: ImageSet
    match: ClassMatch
    collected: Collected
    seconds: float
    calibration: dict[str, Any] | None
    # Of each image in ImageNet's validation set, with `--real-labels`.
    numbers: list[int] | None

    @property
    def places(self) -> Tensor:
        """Where each image of the results lies in the data, whichever classes the model knows; (N,)."""
        indices = self.collected.results.indices
        return torch.from_numpy(self.images.kept)[indices] if isinstance(self.images, RelabelledImages) else indices


def evaluate_source(source: str, size: Size | None, options: EvalOptions, ranks: Ranks) -> Evaluated:
    """Evaluate a source at a (height, width), or at its own size.

    Raises ValueError where source, data and options do not fit together.
    """
    classifier = _load(source, size, options)
    images, match = _open_images(source, classifier, options, split=options.split)
    if options.confusion and len(match.present) > MOST_CLASSES:
        raise ValueError(f"--confusion is for {MOST_CLASSES:,} classes at most, not {len(match.present):,}: take --csv")
    numbers = image_numbers(images) if options.real_labels else None
    views = _views(classifier, source, size, options, ranks.device)
    run = _Run(options, ranks, classifier, views, match)
    temperature = None if options.temperature == "fit" else options.temperature
    if options.temperature_split is not None:
        temperature = run.fit(_open_images(source, classifier, options, split=options.temperature_split)[0])
    started = time.perf_counter()
    collected = run.collect(images, keeps_logits=options.temperature is not None)
    seconds = time.perf_counter() - started
    model, spec = views[0]
    return Evaluated(
        source=source,
        model=model.pretrained_cfg["architecture"],
        weights=classifier.weights,
        device=str(ranks.device),
        size=spec.size,
        num_tokens=num_patches(model, spec.size),
        sizes=[spec.size for _, spec in views],
        images=images,
        match=match,
        # Of several sources, neither logits nor models pile up.
        collected=replace(collected, logits=None),
        seconds=seconds,
        calibration=_calibrate(collected, temperature, options),
        numbers=numbers,
    )


@dataclass(frozen=True)
class _Run:
    """A classifier and the views of images that it is shown."""

    options: EvalOptions
    ranks: Ranks
    classifier: Classifier
    views: list[tuple[TimmModel, InputSpec]]
    match: ClassMatch

    def collect(self, images: ImageSet, *, keeps_logits: bool) -> Collected:
        num_bytes = 4 * len(images) * len(self.match.class_names)
        if keeps_logits and num_bytes > MOST_LOGIT_BYTES:
            raise ValueError(
                f"--temperature keeps all logits, {num_bytes / 2**30:.1f} GiB for {len(images):,} images: evaluate "
                "fewer images, or without it"
            )
        return collect(
            [model for model, _ in self.views],
            [self._loader(images, spec) for _, spec in self.views],
            device=self.ranks.device,
            amp_dtype=amp_precision(
                self.classifier, self.options.model_dump(include={"amp", "amp_dtype"}, exclude_unset=True)
            ),
            say=note,
            flips=self.options.tta,
            present=self.match.present if self.match.is_subset else None,
            num_logits=len(self.match.class_names) if keeps_logits else None,
        )

    def fit(self, images: ImageSet) -> float:
        collected = self.collect(images, keeps_logits=True)
        assert collected.logits is not None
        return fit_temperature(collected.logits, collected.results.labels)

    def _loader(self, images: ImageSet, spec: InputSpec) -> Loader:
        settings = self.classifier.settings
        of_run = settings.get("validation_batch_size") or settings.get("batch_size", DEFAULT_BATCH_SIZE)
        return create_eval_loader(
            images,
            spec,
            batch_size=self.options.batch_size or of_run,
            workers=usable_workers(self.options.workers),
            device=self.ranks.device,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            pin_memory=self.ranks.device.type == "cuda",
            on_bad_image=self.options.on_bad_image,
        )


def num_patches(model: nn.Module, size: Size) -> int | None:
    """Patches that a ViT cuts an image of that size into, prefix tokens not counted; None for other models."""
    embedding = getattr(model, "patch_embed", None)
    if not isinstance(embedding, PatchEmbed):
        return None
    height, width = embedding.dynamic_feat_size(size)
    return int(height * width)


def _load(source: str, size: Size | None, options: EvalOptions) -> Classifier:
    return load_classifier(
        source,
        weights=options.weights,
        img_size=size,
        model_name=options.model,
        model_kwargs=options.model_kwargs,
        use_ema=options.use_ema,
    )


def _views(
    classifier: Classifier, source: str, size: Size | None, options: EvalOptions, device: torch.device
) -> list[tuple[TimmModel, InputSpec]]:
    """The model at each size that images are shown at, the first that of the evaluation."""
    base = _input_spec(classifier, options, size)
    views = [(classifier.model.to(device), base)]
    embedding = getattr(classifier.model, "patch_embed", None)
    multiple = embedding.patch_size[0] if isinstance(embedding, PatchEmbed) else USUAL_STRIDE
    sizes = dict.fromkeys(scaled_size(base.size, scale, multiple=multiple) for scale in options.tta_scales)
    for other in sizes:
        if other != base.size:
            scaled = _load(source, other, options)
            views.append((scaled.model.to(device), _input_spec(scaled, options, other)))
    # The evaluation's own size is one of the views only where its scale was asked for.
    return views[1:] if sizes and base.size not in sizes else views


def _input_spec(classifier: Classifier, options: EvalOptions, size: Size | None) -> InputSpec:
    names = ("crop_pct", "crop_mode", "mean", "std", "interpolation")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return input_spec(classifier, img_size=size, given=given)


def _open_images(
    source: str, classifier: Classifier, options: EvalOptions, *, split: str
) -> tuple[ImageSet, ClassMatch]:
    images = open_images(options.data_dir, split=split, missing_classes="allow")
    match = match_classes(
        images.class_names,
        classifier.class_names,
        num_classes=classifier.model.num_classes,
        model=source,
        data=str(images.root),
        allow_subset=options.allow_subset,
    )
    is_as_it_is = match.class_names == images.class_names
    return images if is_as_it_is else RelabelledImages(images, match), match


def _calibrate(collected: Collected, temperature: float | None, options: EvalOptions) -> dict[str, Any] | None:
    """Loss and ECE at the temperature given, or fitted on images that are not among those it is judged by."""
    if options.temperature is None:
        return None
    results, logits = collected.results, collected.logits
    assert logits is not None
    if temperature is not None:
        split = options.temperature_split
        fitted_on = "given" if split is None else f"split {split}"
        return {"fitted_on": fitted_on, **calibration(results, logits, temperature)}
    if len(results.labels) < 2:
        raise ValueError("--temperature fit needs an image to fit and another to judge; there is one only")
    fitted, judged = halves(len(results.labels), seed=options.seed)
    temperature = fit_temperature(logits[fitted], results.labels[fitted])
    found = calibration(results.take(judged), logits[judged], temperature)
    return {"fitted_on": f"a random half ({len(fitted)} images)", **found}
