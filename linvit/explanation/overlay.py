"""Maps over patches put back on the image that they are of, as pictures.

h × w patches, H × W pixels of the image.
"""

import io
import textwrap
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from linvit.data.geometry import CropPlan
from linvit.data.tiling import Box
from linvit.output.files import write_file
from linvit.output.plots import drawable, save_figure

# Even steps of a map are even steps to the eye, in grey too.
COLOURS = "inferno"
# Longest side of a picture in pixels: larger images shrink, smaller ones are enlarged.
LARGEST, SMALLEST = 1600, 400
MOST_KEYS = 12
_INCH = 100
# Width of a character in a title.
_PIXELS_PER_CHARACTER = 9


def place(patches: np.ndarray, plan: CropPlan, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """A map of patches (h, w) over the whole image, float32; NaN where the model does not look.

    Values between the centres of patches are interpolated linearly.

    Args:
        plan: the crop that the model sees of the image.
        size: (height, width) of the result; by default the image's own.
    """
    rows, columns = (
        _interpolation(count, edges, length, full)
        for count, edges, length, full in zip(patches.shape, patch_edges(plan), size or plan.shape, plan.shape)
    )
    placed: np.ndarray = rows @ patches.astype(np.float32) @ columns.T
    return placed


def patch_edges(plan: CropPlan) -> tuple[tuple[float, float], tuple[float, float]]:
    """Top and bottom, left and right of the part of the image that the patches cover, which may extend beyond it."""
    top, left, height, width = plan.window
    scales = height / plan.resized[0], width / plan.resized[1]
    vertical, horizontal = (
        (start + offset * scale, start + (offset + length) * scale)
        for start, offset, length, scale in zip((top, left), plan.offset, plan.size, scales)
    )
    return vertical, horizontal


def _interpolation(count: int, edges: tuple[float, float], length: int, full: int) -> np.ndarray:
    """Weights of `count` patches between two edges for each of `length` points along an axis of `full` pixels.

    (length, count) float32; rows of NaN outside of the edges.
    """
    first, last = edges
    places = ((np.arange(length) + 0.5) * (full / length) - first) / (last - first) * count - 0.5
    is_seen = (places >= -0.5) & (places < count - 0.5)
    places = places.clip(0, count - 1)
    weights = np.maximum(1 - np.abs(places[:, None] - np.arange(count)), 0)
    return np.where(is_seen[:, None], weights, np.nan).astype(np.float32)


def normalise(heat: np.ndarray) -> np.ndarray:
    """A map from 0 (nothing, or negative) to 1 (its largest value); NaN stays."""
    largest = np.nanmax(heat, initial=0)
    return np.clip(heat, 0, None) / largest if largest > 0 else np.where(np.isnan(heat), heat, 0)


def blend(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 under its map (H, W), which hides more of it where it is larger: (H, W, 3) uint8."""
    strength = np.nan_to_num(normalise(heat))[..., None]
    colours = matplotlib.colormaps[COLOURS](strength[..., 0])[..., :3] * 255
    opacity = 0.25 + 0.5 * strength
    shown = np.where(np.isnan(heat)[..., None], image * 0.4, image * (1 - opacity) + colours * opacity)
    return shown.round().astype(np.uint8)


def title_of(label: str | None, probability: float | None, *, method: str, explained: str | None) -> str:
    """The title of a map: the predicted class, the method, and the class that it explains, if any."""
    if label is None or probability is None:
        return method
    title = f"{label} {100 * probability:.1f} %"
    return f"{title} ({method} for {explained})" if explained is not None else f"{title} ({method})"


def save_overlay(path: Path, image: np.ndarray, heat: np.ndarray, *, title: str) -> None:
    """Write an image (H, W, 3) under its map (H, W) as a PNG, with a title and a legend.

    Raises OSError, naming the file, where it cannot be written.
    """
    shown = blend(_fit(image), _fit(heat))
    height, width = shown.shape[:2]
    # Matplotlib makes no room for lines that it breaks itself.
    lines = textwrap.wrap(drawable([title])[0], max(width, SMALLEST) // _PIXELS_PER_CHARACTER)
    figure = Figure(
        figsize=(
            max(width, SMALLEST) / _INCH + 0.9,
            max(height, SMALLEST // 4) / _INCH + 0.4 + 0.2 * len(lines),
        ),
        layout="constrained",
    )
    axes = figure.subplots()
    axes.imshow(shown)
    axes.axis("off")
    axes.set_title("\n".join(lines), fontsize=11)
    legend = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), COLOURS)
    bar = figure.colorbar(legend, ax=axes, fraction=0.04, pad=0.01, ticks=[0, 0.5, 1])
    bar.set_label("share of the largest value", fontsize=9)
    save_figure(path, figure, dpi=_INCH)


def save_heads(path: Path, maps: np.ndarray, *, title: str) -> None:
    """Write the maps of all layers and heads, (L, heads, h, w), as a grid of small pictures (PNG)."""
    rows = {f"layer {number}": list(layer) for number, layer in enumerate(maps)}
    _save_grid(path, rows, column="head", title=title)


def save_keys(path: Path, layers: dict[str, np.ndarray]) -> None:
    """Write the first rows of each layer's E, from (M, k, h, w) by the layer's name, as a grid of small pictures."""
    rows = {name: list(maps[0, :MOST_KEYS]) for name, maps in layers.items()}
    _save_grid(path, rows, column="key", title=f"the first {MOST_KEYS} keys of each layer")


def _save_grid(path: Path, rows: dict[str, list[np.ndarray]], *, column: str, title: str) -> None:
    num_columns = max(map(len, rows.values()))
    height, width = next(iter(rows.values()))[0].shape
    side = 1.1
    figure = Figure(figsize=(side * num_columns + 0.6, side * len(rows) * height / width + 0.8), layout="constrained")
    grid = figure.subplots(len(rows), num_columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for number in range(num_columns):
        grid[0, number].set_title(f"{column} {number}", fontsize=8)
    for line, (name, maps) in zip(grid, rows.items()):
        line[0].set_ylabel(name, fontsize=8)
        for axes, values in zip(line, maps):
            axes.imshow(normalise(values), cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest")
    figure.suptitle(drawable([title])[0], fontsize=10)
    save_figure(path, figure, dpi=_INCH)


def save_values(path: Path, heat: np.ndarray) -> None:
    """Write a map (H, W) as a 16-bit grey PNG of the image's size, 65,535 for its largest value."""
    levels = (np.nan_to_num(normalise(heat)) * 65535).round().astype(np.uint16)
    encoded = io.BytesIO()
    Image.fromarray(levels).save(encoded, format="PNG")
    write_file(path, lambda file: file.write(encoded.getbuffer()))


def _fit(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W) or (H, W, 3) whose longer side is within `SMALLEST` and `LARGEST`."""
    height, width = picture.shape[:2]
    longest = max(height, width)
    scale = min(max(longest, SMALLEST), LARGEST) / longest
    if scale == 1:
        return picture
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)


class Mosaic:
    """A map over an image, averaged where tiles overlap.

    Args:
        shape: (height, width) of the image.
        longest_side: pixels of the longest side of the map, if it is smaller than the image.
    """

    def __init__(self, shape: tuple[int, int], *, longest_side: int | None = None) -> None:
        self._shape = shape
        self._total = np.zeros(shrunk(shape, longest_side), np.float32)
        self._count = np.zeros(self._total.shape, np.uint16)

    def add(self, box: Box, patches: np.ndarray, plan: CropPlan) -> None:
        """Add the map of a tile's patches (h, w); `plan` is what the model sees of the tile."""
        window = self._window(box)
        self._total[window] += place(patches, plan, size=self._count[window].shape)
        self._count[window] += 1

    def mean(self) -> np.ndarray:
        """The map, float32; NaN where no tile has been added."""
        with np.errstate(invalid="ignore"):
            return self._total / self._count

    def _window(self, box: Box) -> tuple[slice, slice]:
        edges = []
        for start, length, full, scaled in zip(box[:2], box[2:], self._shape, self._total.shape):
            first = min(round(start * scaled / full), scaled - 1)
            # A narrow tile still gets a pixel.
            edges.append(slice(first, max(round((start + length) * scaled / full), first + 1)))
        return edges[0], edges[1]


def shrunk(shape: tuple[int, int], longest_side: int | None) -> tuple[int, int]:
    """(height, width) with the same aspect ratio and at most this longest side; at least one pixel each."""
    scale = 1.0 if longest_side is None else min(1.0, longest_side / max(shape))
    return max(round(shape[0] * scale), 1), max(round(shape[1] * scale), 1)
