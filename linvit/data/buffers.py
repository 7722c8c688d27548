"""Memory for batches that is used again: of fresh memory, each 4 KiB cost a page fault when they are first written."""

import math
from collections import deque

import torch
from torch.utils.data import get_worker_info

# The batches of a worker that are filled, sent or read at a time; one that is kept for longer keeps its memory.
_KEPT = 4


class Buffers:
    """Buffers of one process, each taken again once the reader of the batch in it, in any process, has set it free."""

    def __init__(self) -> None:
        self._kept: deque[torch.Tensor] = deque(maxlen=_KEPT)

    def take(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of this shape, uint8, to be filled, and their mark (1,) uint8: set to 0, it sets them free."""
        num_bytes = math.prod(shape)
        # The mark is the last byte, so that it goes wherever the images go.
        free = (buffer for buffer in self._kept if len(buffer) == num_bytes + 1 and not buffer[-1])
        buffer = next(free, None)
        if buffer is None:
            buffer = torch.empty(num_bytes + 1, dtype=torch.uint8)
            if get_worker_info() is not None:
                # Filled where the main process will read it, instead of copied there when sent.
                buffer.share_memory_()
            self._kept.append(buffer)
        buffer[-1] = 1
        return buffer[:-1].view(shape), buffer[-1:]
