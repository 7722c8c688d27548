"""The processes of a run: joining them, reporting their errors, exchanging values, and stopping on a signal.

A run has one process, or as many as torchrun (or SLURM) starts. Ctrl-C, SIGTERM and SIGUSR1 (SLURM's warning) become a
stop request, which the training loop honours between two updates.
"""

import atexit
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, world_info_from_env
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from linvit.device import choose_device
from linvit.output.terminal import printable
from linvit.settings.process import UsageError

Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")
# A process that lost the others waits this long before it ends, so that torchrun sees the failed process first.
SECONDS_BEFORE_LOST_RANKS = 3.0
# Splitting a batch handles most cases of memory running out; this message is for the rest.
OUT_OF_MEMORY = (
    "memory ran out, and splitting the batch does not help here: set a smaller --model or --img-size, or use --fsdp on "
    "several GPUs, then --resume from the last checkpoint"
)
# How long processes of `waiting_group` wait for each other.
_LONGEST_WAIT = timedelta(days=365)
# The signals that stop a run; SIGUSR1 does not exist on every system.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if os.name == "posix" else []))


class RankError(ValueError):
    """The error that ended one of several processes; its message begins with the rank."""

    exit_status = 1


class PrimaryError(RankError):
    """The primary process's error, raised in the others too; only the primary reports it."""

    is_reported = True

    def __init__(self, error: ValueError | OSError) -> None:
        super().__init__(str(error))
        self.exit_status = getattr(error, "exit_status", 1)


class LostRanksError(RankError):
    """The connection to the other processes is lost, because one of them failed."""


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_primary(self) -> bool:
        """Whether this is the process that prints and writes for all."""
        return self.rank == 0


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the other processes, if torchrun or SLURM started several: over gloo on CPUs, NCCL on GPUs.

    With several processes, a ValueError or OSError is raised as a RankError that names the rank, and any other error
    gets a note with the rank. torchrun then ends the other processes. Raises UsageError for an unknown device and
    ValueError if there are more processes than GPUs or memory runs out.
    """
    chosen = choose_device(device)
    local_rank, _, world_size = world_info_from_env()
    if world_size > 1 and chosen == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; start "
            "one process per GPU (--nproc-per-node), or set --device cpu"
        )
    found = init_distributed_device_so(device=chosen)
    ranks = Ranks(torch.device(found["device"]), found["global_rank"], found["local_rank"], found["world_size"])
    if ranks.world_size > 1:
        # Reference cycles of the model keep the group and gloo's threads alive. A thread that releases a tensor of the
        # last collective while the interpreter shuts down aborts the process.
        atexit.register(gc.collect)
    try:
        try:
            yield ranks
        except torch.OutOfMemoryError as error:
            raise ValueError(OUT_OF_MEMORY) from error
    except Exception as error:
        if ranks.world_size == 1 or isinstance(error, PrimaryError):
            raise
        if _is_lost_connection(error):
            time.sleep(SECONDS_BEFORE_LOST_RANKS)
            raise LostRanksError(f"rank {ranks.rank}: another process failed; its own message says why") from error
        if isinstance(error, ValueError | OSError):
            named = RankError(f"rank {ranks.rank}: {error}")
            named.exit_status = getattr(error, "exit_status", 1)
            raise named from error
        error.add_note(f"in the process of rank {ranks.rank}")
        raise
    # Not after an error: leaving the group waits for the other processes, which may be waiting for this one.
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_lost_connection(error: Exception) -> bool:
    # gloo raises a plain RuntimeError that names its own source file.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def refuse_several_processes(fix: str) -> None:
    """Raise UsageError, with this fix, if torchrun or srun started several processes; the first reports it."""
    # In a shell of salloc, SLURM_NTASKS counts tasks that nobody started.
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        error = UsageError(f"this command runs in one process: {fix}")
        raise error if world_info_from_env()[1] == 0 else PrimaryError(error)


def record_errors(work: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Wrap `work` so that torchrun prints its error as the root cause; without torchrun nothing changes."""
    return cast(Callable[Arguments, int], record(work, error_handler=_ErrorFile()))


class _ErrorFile(ErrorHandler):
    """Writes an error to the file that torchrun reads: the message of a user's error, the traceback of a bug."""

    def initialize(self) -> None:
        """Enable tracebacks of crashes, if torchrun started the process."""
        if self._get_error_file_path() is not None:
            super().initialize()

    def record_exception(self, e: BaseException) -> None:
        """Write the file, unless another process failed first."""
        file = self._get_error_file_path()
        if file is None or isinstance(e, LostRanksError | PrimaryError):
            return
        if not isinstance(e, ValueError | OSError):
            super().record_exception(e)
            return
        # Without a call stack torchrun prints the message. It finds the first error by its timestamp.
        extra = {"timestamp": str(int(time.time()))}
        with open(file, "w", encoding="utf-8") as report:
            json.dump({"message": {"message": printable(str(e)), "extraInfo": extra}}, report)


def usable_workers(workers: int) -> int:
    """`workers`, but at most one per CPU: more would wait for each other and change nothing."""
    return min(workers, os.cpu_count() or 1)


def waiting_group() -> dist.ProcessGroup | None:
    """A group of all processes over gloo, for tensors on the CPU, in which they wait for each other for up to a year.

    The default group gives up after 10 (NCCL) or 30 minutes. None for a single process; all processes must call it.
    """
    if not dist.is_initialized():
        return None
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_LONGEST_WAIT))


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Add `values` over all processes, in place; all processes must call it."""
    if dist.is_initialized():
        dist.all_reduce(values, group=group)
    return values


def largest_over_ranks(value: int, device: torch.device) -> int:
    """The largest `value` of all processes; all processes must call it."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def on_primary(call: Callable[[], Value], group: dist.ProcessGroup | None = None) -> Value:
    """Run `call` in the primary process and return its result in all; a ValueError or OSError is raised in all.

    In the others it is a PrimaryError, which they do not report. The default `group` waits for some minutes only; see
    `waiting_group`.
    """
    if not dist.is_initialized():
        return call()
    result: list[Value | ValueError | OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            result = [call()]
        except (ValueError, OSError) as error:
            result = [error]
    dist.broadcast_object_list(result, group=group)
    if isinstance(result[0], ValueError | OSError):
        raise result[0] if dist.get_rank() == 0 else PrimaryError(result[0])
    return cast(Value, result[0])


class StopRequest:
    """The signal that requested a stop; 0 until one arrives."""

    signal_number: int = 0

    @property
    def exit_code(self) -> int:
        """The shell's exit status: 130 after Ctrl-C, 143 after another signal or a signal to another process."""
        return 128 + (signal.SIGINT if self.signal_number == signal.SIGINT else signal.SIGTERM)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first stop signal into a request. After it, Ctrl-C ends the process and other signals are ignored.

    Schedulers send SIGUSR1 and then SIGTERM, which must not interrupt the save. Outside the main thread, where Python
    allows no signal handlers, signals keep their handlers.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def request_stop(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        for other in STOP_SIGNALS[1:]:
            signal.signal(other, signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have interrupted a print.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C stops at once\n")

    before = {number: signal.signal(number, request_stop) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_requested(request: StopRequest, device: torch.device) -> bool:
    """Whether any process received a stop signal; all processes must call it, and get the same answer."""
    return bool(sum_over_ranks(torch.tensor(float(request.signal_number > 0), device=device)).item())
