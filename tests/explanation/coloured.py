"""Images whose class is the colour of a square, which lies anywhere."""

import numpy as np

COLOURS = ["blue", "green", "red"]
CLASSES = [*COLOURS, "none"]


def coloured_square(label: int, *, seed: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Grey noise (32, 32, 3) with a square of 8 pixels in one colour (or none), and the square's top and left."""
    draw = np.random.default_rng(seed)
    image = np.repeat(draw.integers(60, 110, (32, 32, 1), dtype=np.uint8), 3, axis=2)
    top, left = 4 * draw.integers(0, 7, 2)
    if label < len(COLOURS):
        image[top : top + 8, left : left + 8, 2 - label] = 240
    return image, (int(top), int(left))
