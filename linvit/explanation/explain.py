"""Explain a classifier's predictions on images of any size, by maps at the images' own size."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from linvit.data.augment.build import Pipeline, build_eval_pipeline
from linvit.data.geometry import CropPlan
from linvit.data.loader import normalize
from linvit.data.tiling import Box, Tiling
from linvit.device import autocast
from linvit.evaluation.inference import amp_precision, input_spec, names_of_classes
from linvit.explanation.cam import check_class_maps
from linvit.explanation.maps import (
    BY_GRADIENTS,
    METHODS,
    OF_A_CLASS,
    AttentionMaps,
    Explanation,
    Method,
    approximations,
    attention_maps,
)
from linvit.explanation.overlay import Mosaic, place, shrunk
from linvit.measure.attention import as_vit
from linvit.runs.folder import Classifier
from linvit.runtimes.model import ExportedModel
from linvit.settings.fields import listed, unknown

# Longest side in pixels of the maps of further methods over a tiled image.
_SMALL_SIDE = 256


@dataclass(frozen=True)
class Explained:
    """An image's prediction and its maps.

    Attributes:
        probabilities: of all classes, (C,); empty if the model has no classifier.
        label, probability: the most probable class; None if the model has no classifier.
        explained: the class that the map explains; None for methods that do not explain a class.
        heat: the map over the image, (H, W), or smaller if requested; NaN where the model does not look.
        maps: the maps of all requested methods: of the patches (h, w), for "attention" of all layers and
            heads (L, heads, h, w); with tiles, one over the image, those of further methods shrunk.
        plan: the crop of the image that the patches cover; None with tiles.
        seen: the model's attention on the image; None with tiles and for exported models.
        approximations: why the map is not exact; empty if it is.
    """

    probabilities: np.ndarray
    label: str | None
    probability: float | None
    explained: str | None
    heat: np.ndarray
    maps: dict[Method, np.ndarray]
    plan: CropPlan | None
    seen: Explanation | None
    approximations: tuple[str, ...]


@dataclass(frozen=True)
class _Look:
    """One pass through the model: logits (C,), the class to explain, the maps, and the attention where it is known."""

    logits: Tensor
    target: int
    maps: dict[Method, np.ndarray]
    seen: Explanation | None


class Explainer:
    """Explains the predictions of a Vision Transformer.

    Args:
        classifier: the model, on its device, with its class names and settings.
        img_size: (height, width) of the model's input; by default the model's own.
        tiling: cut larger images into tiles; their maps are averaged where they overlap.

    A model without a classifier has maps by the methods that explain no class, an exported model by "cam" if it was
    exported with heat maps.

    Raises ValueError if the classifier does not take RGB images.
    """

    def __init__(
        self, classifier: Classifier, *, img_size: tuple[int, int] | None = None, tiling: Tiling | None = None
    ) -> None:
        self.model = classifier.model
        self.class_names = names_of_classes(classifier) if classifier.model.num_classes else []
        self.spec = input_spec(classifier, img_size=img_size)
        self.tiling = tiling
        weight = next(self.model.parameters(), None)
        # An exported model moves images to its device itself.
        self.device = torch.device("cpu") if weight is None else weight.device
        self._source = classifier.weights
        self._amp_dtype = amp_precision(classifier)
        self._full = build_eval_pipeline(self.spec)
        # Tiles are not cropped, which would leave gaps between them.
        self._tile = build_eval_pipeline(replace(self.spec, crop_pct=1.0, crop_mode="squash"))

    def class_index(self, name: str) -> int:
        """The index of a class, given by name or by index; raises ValueError for an unknown one."""
        if name in self.class_names:
            return self.class_names.index(name)
        if name.isdecimal() and int(name) < len(self.class_names):
            return int(name)
        raise ValueError(f"{unknown('class', name, self.class_names)}; the classes are {listed(self.class_names)}")

    def check(self, method: Method) -> None:
        """Raise ValueError, naming what is possible instead, if the model cannot be explained by a method."""
        if isinstance(self.model, ExportedModel):
            if self.model.metadata.heatmaps is None:
                raise ValueError(f"{self._source} was exported without heat maps: export it with --with-heatmap")
            if method != "cam":
                raise ValueError(
                    f"{self._source} is an exported model, which has maps by method cam only, not {method}"
                )
            return
        vit = as_vit(self.model)
        if method in OF_A_CLASS and not self.class_names:
            others = ", ".join(each for each in METHODS if each not in OF_A_CLASS)
            raise ValueError(
                f"{self._source} is a model without a classifier (num_classes=0), and method {method} explains a "
                f"class: choose {others}"
            )
        if method == "cam":
            check_class_maps(vit)

    def possible(self, methods: Iterable[Method]) -> list[Method]:
        """Those of the methods that the model can be explained by."""
        found = []
        for method in methods:
            with suppress(ValueError):
                self.check(method)
                found.append(method)
        return found

    def explain(
        self,
        image: np.ndarray,
        *,
        method: Method,
        target: int | None = None,
        more: Sequence[Method] = (),
        longest_side: int | None = None,
    ) -> Explained:
        """The prediction on an image (H, W, 3) uint8 and its map, of class `target` or of the predicted class.

        Args:
            more: further methods, whose maps come from the same pass through the model.
            longest_side: pixels of the longest side of maps over the image, if they should be smaller than it.

        Raises ValueError as `attention_maps` does.
        """
        self.check(method)
        methods = [method, *self.possible(each for each in more if each != method)]
        boxes = [] if self.tiling is None else self.tiling.boxes(*image.shape[:2])
        if len(boxes) > 1:
            return self._explain_tiles(image, boxes, methods, target, longest_side)
        pixels, plan = self.prepare(image)
        look = self._look(pixels, methods, target)
        heat = place(one_map(method, look.maps[method]), plan, size=shrunk(image.shape[:2], longest_side))
        return self._explained(methods, look, look.logits.float().softmax(0), heat, look.maps, plan)

    def _look(self, pixels: Tensor, methods: Sequence[Method], target: int | None) -> _Look:
        """The model's output for one input (1, 3, height, width), and its maps by several methods."""
        if isinstance(self.model, ExportedModel):
            logits, maps = self.model.class_maps(pixels)
            shown = int(logits[0].argmax()) if target is None else target
            return _Look(logits[0], shown, {"cam": maps[0, shown].cpu().numpy()}, None)
        with_gradients = any(method in BY_GRADIENTS for method in methods)
        with autocast(self.device, self._amp_dtype):
            seen = Explanation(as_vit(self.model), pixels, target, with_gradients=with_gradients)
            found = {method: seen.map(method).float().cpu().numpy() for method in methods}
        return _Look(seen.logits, seen.target, found, seen)

    def prepare(self, image: np.ndarray) -> tuple[Tensor, CropPlan]:
        """The model's input (1, 3, height, width) for an image (H, W, 3) uint8, and the crop it is."""
        return self._prepare(image, self._full)

    def _prepare(self, image: np.ndarray, pipeline: Pipeline) -> tuple[Tensor, CropPlan]:
        assert pipeline.crop is not None
        plan = pipeline.crop.plan(*image.shape[:2])
        pixels = torch.from_numpy(np.ascontiguousarray(plan.apply(image)))[None]
        return normalize(pixels.to(self.device), self.spec), plan

    def maps(self, pixels: Tensor, method: Method, target: int | None) -> AttentionMaps:
        """`attention_maps` in the run's precision."""
        chosen = target if method in OF_A_CLASS else None
        with autocast(self.device, self._amp_dtype):
            return attention_maps(self.model, pixels, method=method, classes=chosen)

    def patch_map(self, pixels: Tensor, method: Method, target: int) -> np.ndarray:
        """The map (h, w) of one input (1, 3, height, width) of the model."""
        return one_map(method, self._look(pixels, [method], target).maps[method])

    def keys(self) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """The rows of E of each Linformer layer, (M, k, h, w), by its name, and why they are not exact.

        Raises ValueError if all layers have ordinary attention.
        """
        blank = torch.zeros(1, 3, *self.spec.size, device=self.device)
        found = self.maps(blank, "keys", None)
        layers = {f"layer {number}": maps for number, maps in enumerate(found.maps) if maps is not None}
        return {name: maps.float().cpu().numpy() for name, maps in layers.items()}, found.approximations

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """The model's probabilities (B, C) for images (B, 3, height, width), in evaluation mode."""
        self.model.eval()
        with autocast(self.device, self._amp_dtype):
            logits: Tensor = self.model(pixels)
        return logits.float().softmax(1)

    def approximations(self, methods: Iterable[Method]) -> list[str]:
        """Why maps of these methods are not exact, as full sentences; empty if they are."""
        if isinstance(self.model, ExportedModel):
            return []
        vit = as_vit(self.model)
        return list(dict.fromkeys(sentence for method in methods for sentence in approximations(vit, method)))

    def _explain_tiles(
        self,
        image: np.ndarray,
        boxes: list[Box],
        methods: Sequence[Method],
        target: int | None,
        longest_side: int | None,
    ) -> Explained:
        assert self.tiling is not None
        # A tile is prepared again for its maps: all prepared tiles of a large image do not fit in memory.
        by_tile = torch.cat([self.probabilities(self._prepare_tile(image, box)[0]) for box in boxes])
        merged = by_tile.mean(0) if self.tiling.merge == "mean" else by_tile.amax(0)
        shown = int(merged.argmax()) if target is None else target
        sides = [longest_side, *[_SMALL_SIDE] * (len(methods) - 1)]
        mosaics = {
            method: Mosaic(image.shape[:2], longest_side=side) for method, side in zip(methods, sides, strict=True)
        }
        for box in boxes:
            pixels, plan = self._prepare_tile(image, box)
            look = self._look(pixels, methods, shown)
            for method, mosaic in mosaics.items():
                mosaic.add(box, one_map(method, look.maps[method]), plan)
        merged_maps = {method: mosaic.mean() for method, mosaic in mosaics.items()}
        return self._explained(methods, look, merged, merged_maps[methods[0]], merged_maps, None)

    def _prepare_tile(self, image: np.ndarray, box: Box) -> tuple[Tensor, CropPlan]:
        top, left, height, width = box
        return self._prepare(image[top : top + height, left : left + width], self._tile)

    def _explained(
        self,
        methods: Sequence[Method],
        look: _Look,
        probabilities: Tensor,
        heat: np.ndarray,
        maps: dict[Method, np.ndarray],
        plan: CropPlan | None,
    ) -> Explained:
        best = int(probabilities.argmax()) if self.class_names else None
        return Explained(
            probabilities=probabilities[: len(self.class_names)].float().cpu().numpy(),
            label=None if best is None else self.class_names[best],
            probability=None if best is None else float(probabilities[best]),
            explained=self.class_names[look.target] if methods[0] in OF_A_CLASS else None,
            heat=heat,
            maps=maps,
            plan=plan,
            seen=None if plan is None else look.seen,
            approximations=tuple(self.approximations(methods[:1])),
        )


def one_map(method: Method, found: np.ndarray) -> np.ndarray:
    """One map (h, w): for "attention", of (L, heads, h, w), the mean over the heads of the last layer."""
    mean: np.ndarray = found[-1].mean(0) if method == "attention" else found
    return mean
