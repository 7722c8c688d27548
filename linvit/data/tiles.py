"""Read images in worker processes and cut them into tiles, each resized to the model's size."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from linvit.data.augment.build import InputSpec, build_eval_pipeline
from linvit.data.decode import UnreadableImage
from linvit.data.sources.base import ImageSet
from linvit.data.tiling import Box, Tiling
from linvit.data.worker import start_worker

# The tiles of an image of 2^30 pixels, the most that can be read, with an overlap of an eighth take less than this.
_MAX_TILE_BYTES = 2**33


@dataclass(frozen=True)
class Tiles:
    """The T tiles of an image: boxes in the image, and pixels (T, height, width, 3) uint8 at the model's size."""

    boxes: list[Box]
    pixels: Tensor


def read_tiles(images: ImageSet, spec: InputSpec, tiling: Tiling, *, workers: int) -> Iterator[Tiles | str]:
    """The tiles of each image, in order, or the reason why an image cannot be read.

    Memory holds at most two images per worker in addition to the current one.
    """
    loader: DataLoader[Any] = DataLoader(
        _TiledImages(images, spec, tiling),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=start_worker,
        # Otherwise the loader would draw a seed from torch's global generator.
        generator=torch.Generator(),
    )
    yield from loader


class _TiledImages(Dataset[Tiles | str]):
    def __init__(self, images: ImageSet, spec: InputSpec, tiling: Tiling) -> None:
        self.images = images
        self.spec = spec
        self.tiling = tiling
        self.full_pipeline = build_eval_pipeline(spec)
        # Tiles are not cropped, which would leave gaps between them.
        self.tile_pipeline = build_eval_pipeline(replace(spec, crop_pct=1.0, crop_mode="squash"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tiles | str:
        try:
            image = self.images.read(index, input_range=self.spec.input_range)
        except UnreadableImage as error:
            return str(error).removeprefix(f"{self.images.path(index)}: ")
        num_boxes = self.tiling.num_boxes(*image.shape[:2])
        if num_boxes * math.prod(self.spec.size) * 3 > _MAX_TILE_BYTES:
            return f"would be cut into {num_boxes:,} tiles, more than fit in memory; set a larger --tile"
        boxes = self.tiling.boxes(*image.shape[:2])
        pipeline = self.full_pipeline if len(boxes) == 1 else self.tile_pipeline
        pixels = torch.empty((len(boxes), *self.spec.size, 3), dtype=torch.uint8)
        for tile, (top, left, height, width) in zip(pixels.numpy(), boxes):
            tile[:] = pipeline(image=image[top : top + height, left : left + width])["image"]
        return Tiles(boxes, pixels)
