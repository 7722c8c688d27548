"""Predict the classes of images with `linvit.Predictor`."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from linvit.data.decode import UnreadableImage
from linvit.data.loader import create_eval_loader, normalize
from linvit.data.sources.loose import Input, LooseImages, find_images, iterate_images
from linvit.data.tiles import read_tiles
from linvit.data.tiling import Box, create_tiling
from linvit.device import choose_device
from linvit.distributed import usable_workers
from linvit.evaluation.conformal import read_rule
from linvit.evaluation.inference import BatchForward, amp_precision, fingerprint, input_spec, names_of_classes
from linvit.prediction.options import PredictorOptions
from linvit.runs.folder import Classifier, load_classifier
from linvit.runtimes.model import is_exported, open_exported
from linvit.settings.fields import height_and_width, validate

# Pixels per batch that keep a device busy: 32 or 256 images of 224 px.
BATCH_PIXELS = {"cpu": 32 * 224**2, "cuda": 256 * 224**2}

NOT_FINITE = "the model's output for this image is NaN or infinite"


@dataclass(frozen=True)
class TilePrediction:
    """The most probable classes of a tile, in descending order."""

    box: Box
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, in descending order; empty if there is an error."""

    # The path as given or found; None for an image that is not a file.
    path: str | None
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    # Why there is no prediction: the image cannot be read, or the model's output is not finite.
    error: str | None = None
    # With tiling, at least one; else empty.
    tiles: tuple[TilePrediction, ...] = ()
    # Classes that may be the true one, most probable first, by the rule of `conformal`; None without a rule.
    label_set: tuple[str, ...] | None = None

    @property
    def is_unsure(self) -> bool:
        """Whether the set holds no class or several."""
        return self.label_set is not None and len(self.label_set) != 1


class Predictor:
    """Predicts the classes of files, folders, globs, bytes of files, arrays (H, W, 3) uint8 RGB and PIL images.

    Predictions are those of evaluation.

        predictor = linvit.Predictor("output/RUN")
        for prediction in predictor(["a.jpg", "folder"]):
            print(prediction.path, prediction.labels[0], prediction.probabilities[0])

    A pickle holds `source` and the options only; unpickling loads the model again, on a device of that machine.

    Args:
        source: run folder, folder with config.json and weights, checkpoint, exported model, timm model name, or a
            `Classifier`.
        weights: which weights of a run folder to use.
        img_size: image size of the model, one number or (height, width); by default its own.
        topk: number of most probable classes to return, or all if there are fewer.
        tile: cut larger images into tiles of this side, or (height, width), in pixels; see `Tiling`.
        overlap: minimum number of pixels that neighbouring tiles share; by default an eighth of a tile.
        merge: how to merge the tiles' probabilities of a class.
        batch_size: images or tiles per batch; by default chosen by device and image size. It is halved when memory
            runs out.
        workers: number of processes that read images; 0 reads them in this process.
        device: "cpu", "cuda", "cuda:1", ...; "auto" uses a GPU if there is one.
        amp: whether to use automatic mixed precision; by default as in the run.
        conformal: file of `linvit eval --conformal-file`, for `Prediction.label_set`; not with tiles.
        trust_code: open a `.pt2` file, which can run code.
        say: called with messages, for example when the batch size is halved.

    Raises ValueError if `source` cannot be loaded or the options do not fit it.
    """

    def __init__(
        self,
        source: str | Path | Classifier,
        *,
        weights: Literal["best", "last"] = "best",
        img_size: int | tuple[int, int] | None = None,
        topk: int = 5,
        tile: int | tuple[int, int] | None = None,
        overlap: int | None = None,
        merge: Literal["mean", "max"] = "mean",
        batch_size: int | None = None,
        workers: int = 0,
        device: str = "auto",
        amp: bool | None = None,
        conformal: str | Path | None = None,
        trust_code: bool = False,
        say: Callable[[str], object] = warnings.warn,
    ) -> None:
        settings = {
            "topk": topk,
            "weights": weights,
            "img_size": img_size,
            "batch_size": batch_size,
            "workers": workers,
        }
        tiles = {"tile": tile, "overlap": overlap, "merge": merge}
        others = {"device": device, "amp": amp, "conformal": conformal, "trust_code": trust_code, "say": say}
        self._arguments: dict[str, Any] = {"source": source, **settings, **tiles, **others}
        options = validate(PredictorOptions, {name: _plain(value) for name, value in (settings | tiles).items()})
        if not isinstance(source, str | Path | Classifier):
            raise ValueError(f"source takes a path, a model's name or a Classifier, not {type(source).__name__}")
        if amp not in (None, True, False):
            raise ValueError(f"amp takes True, False or None, not {amp!r}")
        self.tiling = create_tiling(options.tile, overlap=options.overlap, merge=options.merge)
        self.device = torch.device(choose_device(str(device)))
        size = None if options.img_size is None else height_and_width(options.img_size)
        classifier = source
        if not isinstance(classifier, Classifier) and is_exported(str(source)):
            if amp:
                raise ValueError(f"amp: {source} is an exported model, whose precision is fixed; export it with --half")
            classifier = open_exported(str(source), img_size=size, device=str(device), trust_code=trust_code)
        elif not isinstance(classifier, Classifier):
            classifier = load_classifier(str(source), weights=options.weights, img_size=size)
        if amp is not None:
            classifier = replace(classifier, settings={**classifier.settings, "amp": amp})
        model = classifier.model.to(self.device)
        self.class_names = names_of_classes(classifier)
        if conformal is not None and self.tiling is not None:
            raise ValueError("`conformal` was calibrated on full images: remove `tile`")
        self.spec = input_spec(classifier, img_size=size)
        self.conformal = None
        if conformal is not None:
            known = fingerprint(classifier, self.spec)
            self.conformal = read_rule(Path(conformal), class_names=self.class_names, fingerprint=known)
        self.topk = min(options.topk, len(self.class_names))
        self.batch_size = options.batch_size or default_batch_size(self.device, self.spec.size)
        self.workers = usable_workers(options.workers)
        self._forward = BatchForward(model, device=self.device, amp_dtype=amp_precision(classifier), log=say)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._arguments), ()

    def settings(self) -> dict[str, Any]:
        """What predictions depend on besides the weights, as plain values; device and batch size change rounding."""
        amp_dtype = self._forward.amp_dtype
        rule = None if self.conformal is None else self.conformal.model_dump_json()
        return {
            **asdict(self.spec),
            "topk": self.topk,
            "tile": None if self.tiling is None else asdict(self.tiling),
            "amp": None if amp_dtype is None else str(amp_dtype).removeprefix("torch."),
            "class_names": hashlib.sha256("\0".join(self.class_names).encode()).hexdigest(),
            "conformal_rule": None if rule is None else hashlib.sha256(rule.encode()).hexdigest(),
        }

    def __call__(self, images: Input | Iterable[Input]) -> Iterator[Prediction]:
        """A prediction for every image, in order; images of a folder are in natural order.

        A path that does not exist counts as an image that cannot be read. Of a generator, or another iterable without a
        length, only as many images as fill a batch (of each worker) are taken before their predictions are returned.

        Raises ValueError for a folder without images and for an input that is not an image.
        """
        if isinstance(images, str | PathLike | bytes | np.ndarray | Image.Image):
            return self.predict(find_images([images]))
        if not isinstance(images, Iterable):
            raise ValueError(f"{type(images).__name__} is not an image, nor a list of images")
        if isinstance(images, Sized):
            return self.predict(find_images(images))
        return self._predict_in_portions(iterate_images(images))

    def _predict_in_portions(self, images: Iterator[str | bytes | np.ndarray]) -> Iterator[Prediction]:
        # Full batches, so that predictions are the same to the last bit as those of a list.
        while portion := list(islice(images, self.batch_size * max(self.workers, 1))):
            yield from self.predict(LooseImages(portion))

    def predict(self, images: LooseImages) -> Iterator[Prediction]:
        """A prediction for every image, in order, while further images are being read."""
        return self._predict_full(images) if self.tiling is None else self._predict_tiled(images)

    def _predict_full(self, images: LooseImages) -> Iterator[Prediction]:
        loader = create_eval_loader(
            images,
            self.spec,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            pin_memory=self.device.type == "cuda",
            on_bad_image="skip",
        )
        for batch in loader:
            predictions = {
                index: Prediction(images.name(index), error=_why_unreadable(images, index))
                for index in batch.unreadable
            }
            if len(batch.images):
                logits = self._logits(batch.images)
                probabilities = logits.softmax(1)
                are_finite = probabilities.isfinite().all(1).tolist()
                # In double precision, as the rule was calibrated: in single, sure images all have probability one.
                best, sets = self._best(probabilities), self._sets(logits.double().softmax(1))
                for index, is_finite, (labels, values), label_set in zip(
                    batch.indices.tolist(), are_finite, best, sets
                ):
                    name = images.name(index)
                    predictions[index] = (
                        Prediction(name, labels, values, label_set=label_set)
                        if is_finite
                        else Prediction(name, error=NOT_FINITE)
                    )
            # A batch has consecutive indices, including those of unreadable images.
            yield from (predictions[index] for index in sorted(predictions))

    def _predict_tiled(self, images: LooseImages) -> Iterator[Prediction]:
        assert self.tiling is not None
        for index, tiles in enumerate(read_tiles(images, self.spec, self.tiling, workers=self.workers)):
            if isinstance(tiles, str):
                yield Prediction(images.name(index), error=tiles)
                continue
            # (T, C) for all tiles: much smaller than the image.
            probabilities = torch.cat(
                [
                    self._logits(normalize(pixels.to(self.device), self.spec)).softmax(1)
                    for pixels in tiles.pixels.split(self.batch_size)
                ]
            )
            if not probabilities.isfinite().all():
                yield Prediction(images.name(index), error=NOT_FINITE)
                continue
            merged = probabilities.mean(0) if self.tiling.merge == "mean" else probabilities.amax(0)
            ((labels, values),) = self._best(merged[None])
            parts = [TilePrediction(box, *best) for box, best in zip(tiles.boxes, self._best(probabilities))]
            yield Prediction(images.name(index), labels, values, tiles=tuple(parts))

    def _logits(self, images: Tensor) -> Tensor:
        return self._forward(images)

    def _sets(self, probabilities: Tensor) -> Iterator[tuple[str, ...] | None]:
        """The classes of each row that may be true, most probable first; None for each without a rule."""
        if self.conformal is None:
            yield from [None] * len(probabilities)
            return
        order = probabilities.argsort(dim=1, descending=True, stable=True)
        kept = self.conformal.sets(probabilities).gather(1, order)
        for labels, are_kept in zip(order.tolist(), kept.tolist()):
            yield tuple(self.class_names[label] for label, is_kept in zip(labels, are_kept) if is_kept)

    def _best(self, probabilities: Tensor) -> Iterator[tuple[tuple[str, ...], tuple[float, ...]]]:
        """Labels and probabilities of the most probable classes of each row."""
        values, indices = probabilities.topk(self.topk)
        for row, labels in zip(values.cpu().numpy(), indices.tolist()):
            # The shortest decimals that equal the float32 values.
            yield tuple(self.class_names[label] for label in labels), tuple(float(str(value)) for value in row)


def _plain(value: Any) -> Any:
    """NumPy's numbers, and those in a list or tuple, as Python's; other values are returned unchanged."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


def default_batch_size(device: torch.device, size: tuple[int, int]) -> int:
    """The number of images that keeps the device busy, at least one."""
    return max(BATCH_PIXELS.get(device.type, BATCH_PIXELS["cpu"]) // (size[0] * size[1]), 1)


def _why_unreadable(images: LooseImages, index: int) -> str:
    # Workers report which images they could not read, not why.
    try:
        images.read(index)
    except UnreadableImage as error:
        return str(error).removeprefix(f"{images.path(index)}: ")
    return "failed to be read once but not again; predict this image again"
