"""A run in which process 1 fails within an epoch, for test_distributed_runs.py.

torchrun --nproc-per-node 2 ddp_failure.py DATA OUTPUT
"""

import os
import sys
from pathlib import Path
from typing import Any

from tiny_runs import train

from linvit.training.step import TrainStep


def failing(backward: Any) -> Any:
    calls = 0

    def call(self: TrainStep, images: Any, labels: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ValueError("image 7 bites")
        backward(self, images, labels, **kwargs)

    return call


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        TrainStep.backward = failing(TrainStep.backward)
    sys.exit(train(Path(sys.argv[1]), Path(sys.argv[2]), batch_size=1, epochs=100))
