"""Explain a classifier's predictions on images of any size, by maps at the images' own size."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from linvit.data.augment.build import Pipeline, build_eval_pipeline
from linvit.data.geometry import CropPlan
from linvit.data.loader import normalize
from linvit.data.tiling import Box, Tiling
from linvit.device import autocast
from linvit.evaluation.inference import amp_precision, input_spec
from linvit.explanation.maps import OF_A_CLASS, AttentionMaps, Method, attention_maps
from linvit.explanation.overlay import place
from linvit.runs.folder import Classifier
from linvit.settings.fields import unknown


@dataclass(frozen=True)
class Explained:
    """An image's prediction and its map.

    Attributes:
        label, probability: the most probable class.
        explained: the class that the map explains; None for methods that do not explain a class.
        heat: the map at the image's size, (H, W); NaN where the model does not look.
        patches: the map of the patches (h, w); None with tiles.
        heads: the maps of all layers and heads (L, heads, h, w); None without method "attention", and with tiles.
        approximations: why the map is not exact; empty if it is.
    """

    label: str
    probability: float
    explained: str | None
    heat: np.ndarray
    patches: np.ndarray | None
    heads: np.ndarray | None
    approximations: tuple[str, ...]


class Explainer:
    """Explains the predictions of a Vision Transformer.

    Args:
        classifier: the model, on its device, with its class names and settings.
        img_size: (height, width) of the model's input; by default the model's own.
        tiling: cut larger images into tiles; their maps are averaged where they overlap.

    Raises ValueError if the classifier does not take RGB images.
    """

    def __init__(
        self, classifier: Classifier, *, img_size: tuple[int, int] | None = None, tiling: Tiling | None = None
    ) -> None:
        self.model = classifier.model
        self.class_names = classifier.class_names or [str(label) for label in range(self.model.num_classes)]
        self.spec = input_spec(classifier, img_size=img_size)
        self.tiling = tiling
        self.device = next(self.model.parameters()).device
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
        raise ValueError(unknown("class", name, self.class_names))

    def explain(self, image: np.ndarray, *, method: Method, target: int | None = None) -> Explained:
        """The prediction on an image (H, W, 3) uint8 and its map, of class `target` or of the predicted class.

        Raises ValueError as `attention_maps` does.
        """
        boxes = [] if self.tiling is None else self.tiling.boxes(*image.shape[:2])
        if len(boxes) > 1:
            return self._explain_tiles(image, boxes, method, target)
        pixels, plan = self.prepare(image)
        found = self.maps(pixels, method, target)
        patches = self._one_map(found)[0]
        heads = found.maps[0].float().cpu().numpy() if method == "attention" else None
        return self._explained(found, found.logits.softmax(1)[0], place(patches, plan), patches, heads)

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
        found: np.ndarray = self._one_map(self.maps(pixels, method, target))[0]
        return found

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

    def _explain_tiles(self, image: np.ndarray, boxes: list[Box], method: Method, target: int | None) -> Explained:
        assert self.tiling is not None
        prepared = [
            self._prepare(image[top : top + height, left : left + width], self._tile)
            for top, left, height, width in boxes
        ]
        by_tile = torch.cat([self.probabilities(pixels) for pixels, _ in prepared])
        merged = by_tile.mean(0) if self.tiling.merge == "mean" else by_tile.amax(0)
        shown = int(merged.argmax()) if target is None else target
        total, count = np.zeros(image.shape[:2], np.float32), np.zeros(image.shape[:2], np.float32)
        for (top, left, height, width), (pixels, plan) in zip(boxes, prepared):
            found = self.maps(pixels, method, shown)
            window = slice(top, top + height), slice(left, left + width)
            total[window] += place(self._one_map(found)[0], plan)
            count[window] += 1
        return self._explained(found, merged, total / count, None, None)

    def _one_map(self, found: AttentionMaps) -> np.ndarray:
        """One map per image, (B, h, w): for "attention" the mean over the heads of the last layer."""
        maps: Tensor = found.maps[:, -1].mean(1) if found.method == "attention" else found.maps
        return maps.float().cpu().numpy()

    def _explained(
        self,
        found: AttentionMaps,
        probabilities: Tensor,
        heat: np.ndarray,
        patches: np.ndarray | None,
        heads: np.ndarray | None,
    ) -> Explained:
        best = int(probabilities.argmax())
        return Explained(
            label=self.class_names[best],
            probability=float(probabilities[best]),
            explained=None if found.classes is None else self.class_names[int(found.classes[0])],
            heat=heat,
            patches=patches,
            heads=heads,
            approximations=found.approximations,
        )
