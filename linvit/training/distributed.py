"""The processes of a run: one, or as many as torchrun starts; each knows its device and its rank."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor

Value = TypeVar("Value")


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
    """The device that `name` means: "auto" is a GPU where there is one. Raises ValueError where there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is no device; choose cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch finds no CUDA GPU here; choose --device cpu or auto")
    return name


def usable_workers(workers: int) -> int:
    """At most as many as there are CPUs: more would only wait for each other, and change nothing."""
    return min(workers, os.cpu_count() or 1)


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the other processes, if torchrun (or SLURM) started several: gloo on CPUs, nccl on GPUs."""
    found = init_distributed_device_so(device=choose_device(device))
    yield Ranks(torch.device(found["device"]), found["global_rank"], found["local_rank"], found["world_size"])
    # Not after an error: the others may be waiting, and leaving would wait for them.
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """`values` added up in place over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


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
