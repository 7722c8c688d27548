"""Time an exported model beside the original."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from linvit.data.augment.build import InputSpec
from linvit.export.options import ExportOptions
from linvit.measure.timing import Runner, interleave, make_step

_WARMUP = 2


def time_models(models: Mapping[str, nn.Module], spec: InputSpec, options: ExportOptions) -> dict[str, Any]:
    """Seconds per image of each model at batch 1 on the CPU, run in turn: median, all values and their number."""
    images = torch.zeros(1, 3, *spec.size)
    runners = [
        Runner(name, make_step(model, images, mode="forward", dtype=torch.float32)) for name, model in models.items()
    ]
    interleave(runners, rounds=options.rounds, warmup=_WARMUP, clock=time.perf_counter, report=lambda index: None)
    return {
        each.model: {"median": statistics.median(each.seconds), "seconds": each.seconds, "n": len(each.seconds)}
        for each in runners
    }
