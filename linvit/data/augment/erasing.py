"""Random erasing (Zhong et al. 2017, arXiv 1708.04896) with timm's sizes and fills."""

import math
from typing import Any, Literal

import albumentations as A
import numpy as np
from albumentations.core.transforms_interface import BaseTransformInitSchema

# Area of an erased box as a fraction of the image, and the logarithm of its aspect ratio (height/width).
_AREA = (0.02, 1 / 3)
_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))


class RandomErasing(A.ImageOnlyTransform):
    """Overwrites one to `max_count` boxes with the mean colour, a random colour or noise.

    Differs from timm, which erases after normalisation with standard normal numbers. Here the numbers are mapped back
    through the normalisation, so they are rounded and clipped to 0..255 like any pixel.

    Args:
        mode: "const" for the mean colour, "rand" for one normally distributed colour per box, "pixel" for normal noise.
        max_count: maximum number of boxes; the area of each box is divided by the drawn number.
        mean: mean of the normalisation, for pixels in 0..1.
        std: standard deviation of the normalisation.
    """

    class InitSchema(BaseTransformInitSchema):
        mode: Literal["const", "rand", "pixel"]
        max_count: int
        mean: tuple[float, float, float]
        std: tuple[float, float, float]

    def __init__(
        self,
        mode: Literal["const", "rand", "pixel"] = "pixel",
        max_count: int = 1,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        p: float = 0.5,
    ) -> None:
        super().__init__(p=p)
        self.mode = mode
        self.max_count = max_count
        self.mean = mean
        self.std = std

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        count = self.py_random.randint(1, self.max_count)
        drawn = (self._draw_box(height, width, count) for _ in range(count))
        return {"boxes": [(box, self._draw_fill(box[2], box[3])) for box in drawn if box is not None]}

    def apply(
        self, img: np.ndarray, boxes: list[tuple[tuple[int, int, int, int], np.ndarray]], **params: Any
    ) -> np.ndarray:
        img = img.copy()
        for (top, left, height, width), fill in boxes:
            img[top : top + height, left : left + width] = fill
        return img

    def _draw_box(self, height: int, width: int, count: int) -> tuple[int, int, int, int] | None:
        """Top, left, height and width; None if ten drawn boxes did not fit, as in timm."""
        draw = self.py_random
        for _ in range(10):
            area = draw.uniform(*_AREA) * height * width / count
            aspect = math.exp(draw.uniform(*_LOG_ASPECT))
            box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if box_height < height and box_width < width:
                top, left = draw.randint(0, height - box_height), draw.randint(0, width - box_width)
                return top, left, box_height, box_width
        return None

    def _draw_fill(self, height: int, width: int) -> np.ndarray:
        shape = {"const": (1, 1), "rand": (1, 1), "pixel": (height, width)}[self.mode]
        noise = np.zeros((*shape, 3), np.float32)
        if self.mode != "const":
            self.random_generator.standard_normal(dtype=np.float32, out=noise)
        colour = np.float32(255) * (np.asarray(self.mean, np.float32) + np.asarray(self.std, np.float32) * noise)
        return np.clip(np.rint(colour), 0, 255).astype(np.uint8)
