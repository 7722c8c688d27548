"""Arrays as text inside of a page: 8 bits per number, compressed, in base64. `rows.js` reads them."""

import base64
import zlib
from typing import Any

import numpy as np

# Bytes of base64 per byte.
TEXT = 4 / 3
# Level 6 takes twice as long for 2 % less.
_LEVEL = 4
_TYPES = {np.dtype(np.uint8): "u1", np.dtype(np.int8): "i1", np.dtype(np.float32): "f4"}


class Pack:
    """Arrays in one block of bytes. `rows.js` gets the text, and of each array what `add` returned."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0

    def add(self, array: np.ndarray) -> dict[str, Any]:
        """Append an array of uint8, int8 or float32; returns its offset in bytes, shape and type."""
        place = {"at": self._length, "shape": list(array.shape), "type": _TYPES[array.dtype]}
        data = array.astype(array.dtype.newbyteorder("<"), order="C").tobytes()
        # Arrays of float32 begin at a multiple of their size.
        data += b"\0" * (-len(data) % 4)
        self._parts.append(data)
        self._length += len(data)
        return place

    def add_quantised(self, rows: np.ndarray) -> dict[str, Any]:
        """Append rows (…, C) in 8 bits and the step of each row; returns where both are."""
        values, steps = quantise(rows)
        return {"values": self.add(values), "steps": self.add(steps)}

    def text(self) -> str:
        """The block, compressed by zlib and in base64."""
        return base64.b64encode(zlib.compress(b"".join(self._parts), _LEVEL)).decode()


def quantise(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (…, C) as whole numbers of steps, uint8 or, where a number is negative, int8; and the step of each row (…).

    Each number is within half a step, which is the row's largest magnitude / 255 or 127.
    """
    kind = np.dtype(np.int8) if (rows < 0).any() else np.dtype(np.uint8)
    largest = np.iinfo(kind).max
    steps = np.abs(rows).max(axis=-1, initial=0).astype(np.float32) / largest
    divisors = np.where(steps > 0, steps, 1)[..., None]
    return np.rint(rows / divisors).clip(-largest, largest).astype(kind), steps
