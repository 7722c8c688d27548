"""The processes of a run: one, or as many as torchrun starts; each knows its device and its rank.

Ctrl-C, SIGTERM and SIGUSR1 (SLURM's notice) as a wish to stop, which the loop grants between two steps.
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
from types import FrameType
from typing import ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, world_info_from_env
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from linvit.settings.flags import UsageError

Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")
# What a process that lost the others waits, so that the one that failed is first to be noticed and to speak.
SECONDS_TO_SPEAK_LAST = 3.0


# Where a batch runs in parts, memory may run out without a word of this.
OUT_OF_MEMORY = (
    "memory ran out where running a batch in parts does not help: set a smaller --model or --img-size, or --fsdp on "
    "several GPUs, and go on with --resume from the last checkpoint"
)


class RankError(ValueError):
    """What ended one of several processes; its message begins with the process's rank."""


class LostRanksError(RankError):
    """The connection to the other processes is lost: one of them has failed."""


class _Report(ErrorHandler):
    """Leaves an error in the file that torchrun reads: a sentence as it is, a bug with its traceback."""

    def initialize(self) -> None:
        """Print a traceback where the process crashes, if torchrun has started it."""
        if self._get_error_file_path() is not None:
            super().initialize()

    def record_exception(self, e: BaseException) -> None:
        """Write the file, unless another process has failed first."""
        file = self._get_error_file_path()
        if file is None or isinstance(e, LostRanksError):
            return
        if not isinstance(e, ValueError | OSError):
            super().record_exception(e)
            return
        # torchrun prints the call stack where there is one, else the message, and needs the time to find the first.
        extra = {"timestamp": str(int(time.time()))}
        with open(file, "w", encoding="utf-8") as report:
            json.dump({"message": {"message": str(e), "extraInfo": extra}}, report)


def recorded(work: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """`work`, whose error torchrun prints as the cause when it ends all processes; unchanged without torchrun."""
    return cast(Callable[Arguments, int], record(work, error_handler=_Report()))


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_primary(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


def choose_device(name: str) -> str:
    """The device that `name` means: "auto" is a GPU where there is one. Raises UsageError where it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name} is no device; choose cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: torch finds no CUDA GPU here; choose --device cpu or auto")
        found = torch.cuda.device_count()
        if (device.index or 0) >= found:
            raise UsageError(f"--device {name}: the number of GPUs here is {found}, and they are counted from cuda:0")
    elif not _is_there(device):
        raise UsageError(f"--device {name}: there is no such device here; choose --device cpu or auto")
    return name


def _is_there(device: torch.device) -> bool:
    if device.type == "cpu":
        return not device.index
    try:
        # A tensor on "meta" has no values to bring back.
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError):
        return False
    return True


def usable_workers(workers: int) -> int:
    """At most as many as there are CPUs: more would only wait for each other, and change nothing."""
    return min(workers, os.cpu_count() or 1)


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the other processes, if torchrun (or SLURM) started several: gloo on CPUs, nccl on GPUs.

    An error in one of them ends it at once, with its rank, and torchrun then ends the others; RankError stands for
    ValueError and OSError.
    """
    chosen = choose_device(device)
    own, _, processes = world_info_from_env()
    if processes > 1 and chosen == "cuda" and own >= torch.cuda.device_count():
        raise ValueError(
            f"process {own} of this machine has no GPU of its own, of which there are {torch.cuda.device_count()}: "
            "start as many processes as GPUs (--nproc-per-node), or give --device cpu"
        )
    found = init_distributed_device_so(device=chosen)
    ranks = Ranks(torch.device(found["device"]), found["global_rank"], found["local_rank"], found["world_size"])
    if ranks.world_size > 1:
        # A model's cycles keep the group, and so gloo's threads, which may still have a tensor of the last collective
        # to release: a thread that does so while the interpreter ends aborts the process.
        atexit.register(gc.collect)
    try:
        try:
            yield ranks
        except torch.OutOfMemoryError as error:
            raise ValueError(OUT_OF_MEMORY) from error
    except Exception as error:
        if ranks.world_size == 1:
            raise
        if _is_lost_connection(error):
            time.sleep(SECONDS_TO_SPEAK_LAST)
            raise LostRanksError(
                f"rank {ranks.rank}: another process has failed, and its own message says why"
            ) from error
        if isinstance(error, ValueError | OSError):
            raise RankError(f"rank {ranks.rank}: {error}") from error
        error.add_note(f"in the process of rank {ranks.rank}")
        raise
    # Not after an error: the others may be waiting, and leaving would wait for them.
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_lost_connection(error: Exception) -> bool:
    # gloo raises a plain RuntimeError that names its own source file.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def sum_over_ranks(values: Tensor) -> Tensor:
    """`values` added up in place over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def largest_over_ranks(value: int, device: torch.device) -> int:
    """The largest of all processes' values."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def on_primary(call: Callable[[], Value]) -> Value:
    """What `call` returns in the primary process, where alone it is called; a ValueError is raised in all of them."""
    if not dist.is_initialized():
        return call()
    outcome: list[Value | ValueError | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [call()]
        except ValueError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], ValueError):
        raise outcome[0]
    return cast(Value, outcome[0])


# SIGUSR1 is not there on every system.
STOPPING = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if os.name == "posix" else []))


class StopRequest:
    """Which signal asked the run to stop; 0: none."""

    signal_number: int = 0

    @property
    def exit_code(self) -> int:
        """What the shell expects of a process that Ctrl-C (130) or anything else, also in another process, ended."""
        return 128 + (signal.SIGINT if self.signal_number == signal.SIGINT else signal.SIGTERM)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first signal into a request; after it Ctrl-C ends the process as ever, and others change nothing.

    Schedulers repeat themselves while the run still saves: SIGUSR1, then SIGTERM. Outside the main thread, where Python
    lets nobody handle signals, they do what they did before.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        for other in STOPPING[1:]:
            signal.signal(other, signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":
            # Not print, which may itself be what was interrupted.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C stops at once\n")

    before = {number: signal.signal(number, ask) for number in STOPPING}
    try:
        yield request
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


def asked_anywhere(request: StopRequest, device: torch.device) -> bool:
    """Whether any process was asked to stop; all processes call it at the same point and get the same answer."""
    return bool(sum_over_ranks(torch.tensor(float(request.signal_number > 0), device=device)).item())
