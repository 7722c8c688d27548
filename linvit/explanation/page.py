"""The page of `linvit explain`: images with their maps, and where each patch looks, in one self-contained file."""

from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import matplotlib
import numpy as np
from markupsafe import Markup

from linvit.explanation.explain import Explained, one_map
from linvit.explanation.maps import Method
from linvit.explanation.overlay import COLOURS, patch_edges, shrunk
from linvit.explanation.rows import TEXT, Pack, RowPlan, num_rows, pack_attention, pack_projections, plan_rows
from linvit.output.page import image_uri, render

# The methods whose maps do not depend on a layer.
MAPS: tuple[Method, ...] = ("relevance", "gradcam", "cam", "rollout")
# What a page needs of each image.
PAGE_METHODS: tuple[Method, ...] = (*MAPS, "attention")
MEGABYTE = 10**6
# Classes listed per image.
_CLASSES = 5
# Longest side of an image in pixels, and of each of many.
_SIDE, _SMALL_SIDE, _MANY = 800, 480, 12
# Smaller images are not compressed with losses.
_LOSSLESS_SIDE = 128
# Longest side of the map of a tiled image.
_MAP_SIDE = 256


class MapPage:
    """Collects the images of a page, up to a size.

    Args:
        source: the model, as given on the command line.
        method: the map that is shown first.
        methods: those of `PAGE_METHODS` that the model can be explained by.
        class_names: of all classes, in label order; empty for a model without a classifier.
        num_images: the number of images that will be added.
        budget: bytes of the page, about; at least one image is kept.
    """

    def __init__(
        self,
        source: str,
        *,
        method: Method,
        methods: Sequence[Method],
        class_names: list[str],
        num_images: int,
        budget: int,
    ) -> None:
        self._source = source
        self._method = method
        self._maps = [each for each in methods if each in MAPS]
        self._has_attention = "attention" in methods
        self._class_names = class_names
        self._num_images = num_images
        self._budget = budget
        self._plan: RowPlan | None = None
        self._model: dict[str, Any] | None = None
        self._reader = "the classifier"
        self._ordinary: list[int] = []
        self._has_mean = False
        self._entries: list[dict[str, Any]] = []
        self._blocks: list[Markup] = []
        self._used = 0
        self._num_rows = 0
        self._num_left_out = 0
        self._without_rows = False

    @property
    def has_images(self) -> bool:
        return bool(self._entries)

    def add(self, name: str, image: np.ndarray, found: Explained) -> None:
        """Add an image (H, W, 3) uint8 with the maps of all methods; `name` is shown."""
        longest = max(image.shape[:2])
        side = _SIDE if self._num_images <= _MANY else _SMALL_SIDE
        uri = image_uri(image, side=side, kind="png" if longest <= _LOSSLESS_SIDE else "jpg", quality=80)
        # Once one is left out, so are all later ones, even if they are smaller.
        if self._num_left_out or (self._entries and self._used + len(uri) > self._budget):
            self._num_left_out += 1
            return
        pack = Pack()
        classes = np.argsort(-found.probabilities, kind="stable")[:_CLASSES]
        entry = {
            "name": name,
            "classes": [[self._class_names[label], float(found.probabilities[label])] for label in classes],
            "explained": found.explained or found.label,
            "maps": {method: pack.add_quantised(_flat(found, method)) for method in self._maps},
            "shape": list(image.shape[:2]),
            "tiled": found.plan is None,
            **_geometry(found, image.shape[:2]),
        }
        if found.seen is not None:
            if self._plan is None:
                self._start(found, len(uri))
            assert self._plan is not None
            with_rows = self._num_rows < self._plan.num_images
            entry["layers"] = pack_attention(pack, found.seen, self._plan, with_rows=with_rows)
            self._num_rows += with_rows
            self._without_rows |= not with_rows
        else:
            entry["layers"] = None
            if self._has_attention:
                entry["maps"]["attention"] = pack.add_quantised(_flat(found, "attention"))
        self._add_block(f"image-{len(self._entries)}", uri)
        self._add_block(f"pack-{len(self._entries)}", pack.text())
        self._entries.append(entry)

    def html(self, approximations: Iterable[str]) -> str:
        """The page; `approximations` are sentences on why maps are not exact."""
        colours = (matplotlib.colormaps[COLOURS](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
        return render(
            "linvit.explanation",
            "maps.html.j2",
            scripts=("rows.js", "maps.js"),
            title="Where the model looks",
            source=self._source,
            num_images=len(self._entries),
            notes=[*self._limits(), *(f"Approximate: {sentence}." for sentence in approximations)],
            blocks=self._blocks,
            choices=[*self._maps, *(("attention", "patch", "keys") if self._has_attention else ())],
            has_classes=bool(self._class_names),
            page={
                "images": self._entries,
                "model": self._model,
                "method": self._method,
                "reader": self._reader,
                "colours": colours.tobytes().hex(),
            },
        )

    def _start(self, found: Explained, image_bytes: int) -> None:
        """Choose what fits, by the first image, and pack what all images share."""
        assert found.seen is not None
        layers = found.seen.layers
        self._reader = "the class token" if found.seen.reads_class_token else "the mean of the patches"
        num_patches = layers[0].grid_size[0] * layers[0].grid_size[1]
        attention = sum(layer.num_heads * layer.keys.shape[2] for layer in layers)
        other = image_bytes + int(TEXT * (len(self._maps) * num_patches + attention))
        self._plan = plan_rows(found.seen, num_images=self._num_images, budget=self._budget, other=other)
        self._ordinary = [number for number, layer in enumerate(layers) if layer.projection is None]
        self._has_mean = (
            any(num_rows(layer, each_head=False) < layer.num_heads for layer in layers) and not self._plan.each_head
        )
        pack = Pack()
        self._model = pack_projections(pack, found.seen, with_projections=self._plan.has_projections)
        self._add_block("pack-model", pack.text())

    def _add_block(self, name: str, text: str) -> None:
        # Base64 and data URIs contain nothing to escape, and escaping megabytes takes seconds.
        self._blocks.append(Markup('<script type="text/plain" id="{}">').format(name) + Markup(text + "</script>"))
        self._used += len(text)

    def _limits(self) -> list[str]:
        """What the page leaves out for its size."""
        limits = []
        if self._num_left_out:
            limits.append(f"The first {len(self._entries):,} of {self._num_images:,} images are on this page.")
        if self._plan is not None:
            plan, remedy = self._plan, f"--page-size {-(-self._plan.complete // MEGABYTE)} shows all"
            if plan.num_images == 0:
                limits.append(f"Rows of patches are too large for this page ({remedy}).")
            elif self._without_rows:
                limits.append(f"The first {plan.num_images:,} images have rows of patches ({remedy}).")
            if plan.num_images and self._has_mean:
                limits.append(f"Rows of patches are the mean over heads ({remedy}).")
            if plan.num_images and not plan.ordinary and self._ordinary:
                layers = ", ".join(map(str, self._ordinary))
                limits.append(f"Layers with ordinary attention ({layers}) have no rows of patches ({remedy}).")
        return limits


def _flat(found: Explained, method: Method) -> np.ndarray:
    """A map as one row (1, N), without numbers below 0."""
    heat = one_map(method, found.maps[method]) if found.plan is not None else found.maps[method]
    if found.plan is None:
        height, width = shrunk(heat.shape, _MAP_SIDE)
        heat = cv2.resize(heat, (width, height), interpolation=cv2.INTER_AREA)
    return np.maximum(heat, 0).reshape(1, -1)


def _geometry(found: Explained, shape: tuple[int, ...]) -> dict[str, Any]:
    """The grid of the maps, (rows, columns), and the part of the image that it covers, as fractions of it."""
    if found.plan is None:
        height, width = shrunk((shape[0], shape[1]), _MAP_SIDE)
        return {"grid": [height, width], "edges": [[0, 1], [0, 1]]}
    edges = [[edge / length for edge in pair] for pair, length in zip(patch_edges(found.plan), shape)]
    patches = next(one_map(method, each) for method, each in found.maps.items())
    return {"grid": list(patches.shape), "edges": edges}
