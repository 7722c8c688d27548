"""Runs of two processes, for test_distributed_runs.py.

    torchrun --nproc-per-node 2 ddp_runs.py DATA BROKEN OUTPUT PORT ...

A plain run; one that is stopped by a signal to process 1 alone; one in which the loss of process 1 alone becomes NaN;
one in which process 1 alone runs out of memory; and one on the images of BROKEN, many of which cannot be read. Then the
plain run is evaluated, and predicts the validation images of BROKEN in parts.
"""

import atexit
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_runs import train

from linvit.cli import main
from linvit.model.vit import LinformerViT
from linvit.training.step import TrainStep

SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "validation_batch_size": 1,
    "grad_accum_steps": 2,
    "opt": "momentum",
    "lr": 0.05,
    "model_ema": True,
    "model_ema_warmup": True,
}
# One image at a time, so that all batches are equal; --json and --csv are added.
EVAL = ["-b", "1", "-j", "0", "--device", "cpu", "--bootstrap", "20", "--temperature", "fit"]
# Parts of two full batches; -o is added.
PREDICT = ["-b", "2", "-j", "0", "--device", "cpu", "--weights", "last"]
# The settings that differ in each run.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stopped": {},
    "nan": {"max_bad_steps": 1},
    "memory": {},
    "unreadable": {"batch_size": 1, "on_bad_image": "skip"},
}


def disturbed(backward: Any, how: str) -> Any:
    """`backward` that once raises a signal or fills the images with NaN."""
    calls = 0

    def call(self: TrainStep, images: Any, labels: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1 and how == "stopped":
            signal.raise_signal(signal.SIGTERM)
        if calls == 1 and how == "nan":
            images.fill_(float("nan"))
        backward(self, images, labels, **kwargs)

    return call


def limited(forward: Any) -> Any:
    """`forward` that runs out of memory in training with more than two images."""

    def call(self: LinformerViT, images: torch.Tensor) -> torch.Tensor:
        if self.training and len(images) > 2:
            raise torch.OutOfMemoryError("simulated")
        return forward(self, images)

    return call


def use_port(port: str) -> None:
    """torchrun's store still has the addresses of the previous run, so each further run gets a new store."""
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port}


def run_all(
    runs: dict[str, dict[str, Any]], *, data: Path, broken: Path, output: Path, further_ports: Sequence[str]
) -> None:
    """Do the runs one after the other, each further one at its own port; write their exit statuses to a file."""
    rank = int(os.environ["RANK"])
    backward, forward = TrainStep.backward, LinformerViT.forward
    statuses = {}
    for (experiment, settings), port in zip(runs.items(), (None, *further_ports)):
        if port is not None:
            use_port(port)
        TrainStep.backward = disturbed(backward, experiment) if rank == 1 else backward
        LinformerViT.forward = limited(forward) if (experiment, rank) == ("memory", 1) else forward
        images = broken if experiment == "unreadable" else data
        statuses[experiment] = train(images, output, **{"experiment": experiment} | SETTINGS | settings)
        if dist.is_initialized():
            dist.destroy_process_group()
    (output / f"statuses-{rank}.json").write_text(json.dumps(statuses))


def keep_threads(output: Path) -> None:
    """Write the names of all threads of this process, not only Python's."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    (output / f"threads-{os.environ['RANK']}.json").write_text(json.dumps(names))


if __name__ == "__main__":
    data, broken, output = map(Path, sys.argv[1:4])
    # Registered first, so called last.
    atexit.register(keep_threads, output)
    *further_ports, eval_port, predict_port = sys.argv[4:]
    run_all(RUNS, data=data, broken=broken, output=output, further_ports=further_ports)
    use_port(eval_port)
    files = ["--json", str(output / "eval.json"), "--csv", str(output / "eval.csv")]
    status = main(["eval", str(output / "plain"), str(data), *EVAL, *files])
    use_port(predict_port)
    folder = ["-o", str(output / "parts"), "--part-size", "4", "--part-format", "jsonl"]
    sys.exit(status or main(["predict", str(output / "plain"), str(broken / "val"), *PREDICT, *folder]))
