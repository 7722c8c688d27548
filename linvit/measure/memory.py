"""What a step adds to memory: its peak above what was held before it (activations, gradients, workspace).

On a GPU by torch's own count. On a CPU from /proc, in a process of its own per model:

    python -m linvit.measure.memory SPEC HEIGHT WIDTH MODE BATCH DTYPE
"""

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch

from linvit.measure.timing import is_out_of_memory, make_step
from linvit.model.build import build, parse_spec
from linvit.output.files import reason
from linvit.settings.fields import DType, Mode
from linvit.settings.flags import run

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
SET_PEAK_BACK = "5"


class StepMemory(NamedTuple):
    """Bytes that a step adds, and the peak of the whole process (of torch's allocator on a GPU)."""

    step_bytes: int
    process_bytes: int


class OutOfMemory(Exception):
    """The process that was to measure ran out of memory."""


def can_read_peaks() -> bool:
    """Whether this system tells a process its peak memory, and lets it set that back."""
    try:
        CLEAR_REFS.write_text(SET_PEAK_BACK)
        return "VmHWM" in STATUS.read_text()
    except OSError:
        return False


def cuda_step_memory(step: Callable[[], object]) -> StepMemory:
    """Memory of one step on the GPU, by torch's count; all that lies there already is part of the peak."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return StepMemory(peak - before, peak)


def step_memory_of_own_process(
    model: str, img_size: tuple[int, int], *, mode: Mode, batch_size: int, dtype: DType
) -> StepMemory:
    """Memory of one CPU step in a fresh process.

    Raises OutOfMemory, and ValueError with the other process's own sentence for whatever else fails there.
    """
    settings = [model, *img_size, mode, batch_size, dtype]
    command = [sys.executable, "-m", "linvit.measure.memory", *map(str, settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    words = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    # A negative status is a signal: Linux kills what asks for too much.
    if done.returncode < 0 or "out of memory" in words[0]:
        raise OutOfMemory(model)
    if done.returncode != 0:
        raise ValueError(f"measuring the memory of {model} failed: {words[0].removeprefix('error: ')}")
    return StepMemory(**json.loads(done.stdout))


def measure_here(model: str, img_size: tuple[int, int], *, mode: Mode, batch_size: int, dtype: DType) -> StepMemory:
    """Memory of one CPU step in this process, after a like one has grown whatever stays grown."""
    images = torch.randn(batch_size, 3, *img_size)
    step = make_step(build(parse_spec(model), img_size), images, mode=mode, dtype=getattr(torch, dtype))
    step()
    gc.collect()
    _give_back_freed_memory()
    before = _status_bytes("VmRSS")
    CLEAR_REFS.write_text(SET_PEAK_BACK)
    step()
    peak = _status_bytes("VmHWM")
    return StepMemory(peak - before, peak)


def _give_back_freed_memory() -> None:
    """Have glibc return what lies free in its heaps; other C libraries have no such call."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main(argv: Sequence[str]) -> int:
    model, height, width, mode, batch_size, dtype = argv
    try:
        found = measure_here(
            model,
            (int(height), int(width)),
            mode=cast(Mode, mode),
            batch_size=int(batch_size),
            dtype=cast(DType, dtype),
        )
    except (RuntimeError, MemoryError) as error:
        raise ValueError("out of memory" if is_out_of_memory(error) else reason(error)) from error
    print(json.dumps(found._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
