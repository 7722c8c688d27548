"""Runs of a model sharded over two processes, for test_fsdp.py.

    torchrun --nproc-per-node 2 fsdp_runs.py DATA BROKEN OUTPUT PORT ...

A plain run; one with a single E for all layers; a compiled one; one with the first as its teacher; one on the images of
BROKEN, many of which cannot be read; and one that is stopped by a signal to process 1 alone, then resumed.
"""

import sys
from pathlib import Path
from typing import Any

from ddp_runs import RUNS as DDP_RUNS
from ddp_runs import run_all

FSDP: dict[str, Any] = {"fsdp": True, "opt": "adamw", "lr": 1e-3, "clip_grad": 0.5}


def runs(output: Path) -> dict[str, dict[str, Any]]:
    """The settings of each run, in order."""
    teacher = {"kd_model_name": str(output / "plain"), "kd_distill_type": "feature"}
    return {
        "plain": FSDP,
        "layerwise": FSDP | {"share": "layerwise"},
        "compiled": FSDP | {"torchcompile": "eager", "clip_grad": None},
        "taught": FSDP | teacher,
        "unreadable": FSDP | DDP_RUNS["unreadable"],
        "stopped": FSDP | {"checkpoint_minutes": 1e-9},
        "resumed": FSDP | {"experiment": "stopped", "resume": "auto"},
    }


if __name__ == "__main__":
    data, broken, output = map(Path, sys.argv[1:4])
    run_all(runs(output), data=data, broken=broken, output=output, further_ports=sys.argv[4:])
