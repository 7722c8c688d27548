"""Three runs in each of two processes, for test_distributed.py.

    torchrun --nproc-per-node 2 ddp_runs.py DATA OUTPUT PORT PORT

A whole one; one that process 1 alone is asked to stop; one in which the loss of process 1 alone becomes NaN.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tiny_runs import train

from linvit.training.engine import TrainStep

SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "validation_batch_size": 1,
    "grad_accum_steps": 2,
    "opt": "momentum",
    "lr": 0.05,
    "model_ema": True,
    "model_ema_warmup": True,
}


def disturbed(backward: Any, rank: int, how: str) -> Any:
    """`backward` that once, in process 1, asks to stop or makes the images NaN."""
    calls = 0

    def call(self: TrainStep, images: Any, labels: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 1:
            if how == "stop":
                signal.raise_signal(signal.SIGTERM)
            else:
                images.fill_(float("nan"))
        backward(self, images, labels, **kwargs)

    return call


if __name__ == "__main__":
    data, output, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
    backward = TrainStep.backward
    statuses = {}
    for experiment, port in zip(("whole", "stopped", "nan"), (None, *sys.argv[3:])):
        if port is not None:
            # torchrun's own meeting place knows the addresses of the run before, so each further run gets a new one.
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port}
            TrainStep.backward = disturbed(backward, rank, "stop" if experiment == "stopped" else "nan")
        statuses[experiment] = train(data, output, experiment, **SETTINGS)
        if dist.is_initialized():
            dist.destroy_process_group()
    (output / f"statuses-{rank}.json").write_text(json.dumps(statuses))
