"""Images as small pictures inside an HTML page."""

import base64
from collections.abc import Sequence

import cv2

from linvit.data.check.reading import Source
from linvit.data.check.tree import ImageEntry
from linvit.data.read import UnreadableImage, decode_image

_SIDE = 180


class Pictures:
    """Reads the images of a listing again, to show them.

    Args:
        avoid: paths of images that are not to be decoded.
    """

    def __init__(self, images: Sequence[ImageEntry], source: Source, *, avoid: set[str]) -> None:
        self._index = {image.path: index for index, image in enumerate(images) if image.path not in avoid}
        self._source = source

    def data_uri(self, path: str) -> str | None:
        """The image at most 180 pixels a side, or None where it cannot be shown."""
        if path not in self._index:
            return None
        try:
            image = decode_image(self._source.read(self._index[path], path), name=path)
        except UnreadableImage:
            return None
        height, width = image.shape[:2]
        scale = min(1.0, _SIDE / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
        return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
