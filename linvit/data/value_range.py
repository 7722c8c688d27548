"""The values that 16-bit images use: 12-bit data in 16-bit files would be nearly black."""

import cv2
import numpy as np

from linvit.data.decode import InputRange, UnreadableImage
from linvit.data.sources.base import ImageSet

# Images that are measured, evenly spread over a set.
_MAX_IMAGES = 256
# A share of brighter pixels, such as hot ones of a sensor, is left out if it would more than double the range.
_OUTLIERS = 0.001


def value_range(data: bytes) -> InputRange | None:
    """The lowest and highest value of an image of 16 bits per channel; None for other files."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if image is None or image.dtype not in (np.uint16, np.int16):
        return None
    # Without an alpha channel.
    colours = image[..., :3] if image.ndim == 3 else image
    lowest = int(np.iinfo(image.dtype).min)
    counts = np.bincount(colours.reshape(-1).astype(np.int32) - lowest, minlength=2**16)
    (used,) = np.nonzero(counts)
    low, high = int(used[0]) + lowest, int(used[-1]) + lowest
    bright = int(np.searchsorted(np.cumsum(counts), (1 - _OUTLIERS) * colours.size)) + lowest
    return low, bright if low < bright and bright - low < (high - low) / 2 else high


def measure_input_range(images: ImageSet) -> tuple[InputRange | None, int]:
    """The lowest and highest value of a sample's 16-bit images, None if there are none, and their number."""
    count = len(images)
    ranges = []
    for index in np.linspace(0, count - 1, min(_MAX_IMAGES, count)).astype(int).tolist():
        try:
            found = value_range(images.read_bytes(index))
        except UnreadableImage:
            continue
        if found is not None:
            ranges.append(found)
    if not ranges:
        return None, 0
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    return (low, max(high, low + 1)), len(ranges)
