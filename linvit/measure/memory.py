"""Measure the extra memory of a step: its peak above what was allocated before (activations, gradients, workspace).

On a GPU torch's allocator counts it. On a CPU it is read from Linux's /proc, in a subprocess per model:

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
from linvit.settings.process import run

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
# Written to CLEAR_REFS, it resets the peak memory (VmHWM) to the current memory; see proc_pid_clear_refs(5).
RESET_PEAK = "5"


class StepMemory(NamedTuple):
    """Extra memory of a step, and peak memory of the whole process (on a GPU, of torch's allocator), in bytes."""

    step_bytes: int
    process_bytes: int


class OutOfMemory(Exception):
    """The subprocess that measured memory ran out of it."""


def can_read_peaks() -> bool:
    """Whether this system lets a process read and reset its peak memory."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
        return "VmHWM" in STATUS.read_text()
    except OSError:
        return False


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory so far: of torch's allocator on a GPU, else of this process; None where it cannot be read."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status_bytes("VmHWM")
    except (OSError, StopIteration):
        return None


def cuda_step_memory(step: Callable[[], object]) -> StepMemory:
    """Memory of one step on the GPU; the peak includes everything that was allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return StepMemory(peak - before, peak)


def cpu_step_memory(step: Callable[[], object]) -> StepMemory:
    """Memory of one step on the CPU, in this process. An equal step must have run before, to fill caches."""
    gc.collect()
    # Have glibc return free memory to the system; other C libraries lack this call.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status_bytes("VmRSS")
    CLEAR_REFS.write_text(RESET_PEAK)
    step()
    peak = _status_bytes("VmHWM")
    return StepMemory(peak - before, peak)


def step_memory_in_subprocess(
    model: str, img_size: tuple[int, int], *, mode: Mode, batch_size: int, dtype: DType
) -> StepMemory:
    """Memory of one CPU step of a model, such as "linvit_small_patch16_224:k=64", in a fresh process.

    Raises OutOfMemory if the subprocess runs out of memory, and ValueError with its message if it fails otherwise.
    """
    settings = [model, *img_size, mode, batch_size, dtype]
    command = [sys.executable, "-m", "linvit.measure.memory", *map(str, settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    message = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    # A negative status is a signal: Linux kills a process that takes too much memory.
    if done.returncode < 0 or "out of memory" in message:
        raise OutOfMemory(model)
    if done.returncode != 0:
        raise ValueError(f"measuring the memory of {model} failed: {message.removeprefix('error: ')}")
    return StepMemory(**json.loads(done.stdout))


def measure_here(model: str, img_size: tuple[int, int], *, mode: Mode, batch_size: int, dtype: DType) -> StepMemory:
    """Memory of a model's second CPU step, in this process."""
    images = torch.randn(batch_size, 3, *img_size)
    step = make_step(build(parse_spec(model), img_size), images, mode=mode, dtype=getattr(torch, dtype))
    step()
    return cpu_step_memory(step)


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main(argv: Sequence[str]) -> int:
    """Measure as the arguments say and print the result as JSON; raises ValueError where that fails."""
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
