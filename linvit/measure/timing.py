"""Time models in turn, so that other load on the machine slows all of them alike, and count their operations.

FLOPs are two per multiply-add, as torch counts them; the fastest matrix products of this machine are its peak.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn, no_grad
from torch.utils.flop_counter import FlopCounterMode

from linvit.device import autocast
from linvit.output.files import reason
from linvit.settings.fields import Mode

# Sides of the square matrices that are multiplied to find the fastest speed.
GEMM_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
GEMM_REPEATS = 5


def count_flops(model: nn.Module, images: Tensor, *, mode: Mode, **arguments: Any) -> int:
    """Operations of one forward pass or training step; `model` and `images` are on the meta device.

    `arguments` are further keywords of the model.

    On the meta device a step costs neither time nor memory, and attention is two matrix products in the forward pass
    and four in the backward pass. What a fused kernel recomputes to save memory is therefore not counted. (torch's
    counter does not know the fused CPU kernel at all.)
    """
    assert images.is_meta
    model.train(mode == "train")
    counter = FlopCounterMode(display=False)
    if mode == "forward":
        with counter, no_grad():
            model(images, **arguments)
    else:
        with counter:
            model(images, **arguments).sum().backward()
        model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def gemm_flops_per_second(dtype: torch.dtype, device: torch.device, *, clock: Callable[[], float]) -> float:
    """Operations per second of the fastest of several square matrix products, with the current number of threads.

    This is an upper bound on the speed of a model, which consists of matrix products. `clock` returns seconds and
    waits for the device.
    """
    best = 0.0
    for size in GEMM_SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        a @ b
        for _ in range(GEMM_REPEATS):
            started = clock()
            a @ b
            best = max(best, 2 * size**3 / (clock() - started))
    return best


Step = Callable[[], Tensor]


@dataclass
class Runner:
    """A model's step, which returns the logits, and the seconds that its timed steps took."""

    model: str
    step: Step
    seconds: list[float] = field(default_factory=list)
    is_out_of_memory: bool = False
    has_run: bool = False

    def run(self) -> None:
        """Run one step and record whether it runs out of memory.

        Raises ValueError, naming the model, if the step fails for another reason or its first outputs are not finite.
        """
        try:
            logits = self.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise ValueError(f"{self.model} fails: {reason(error)}") from error
            self.is_out_of_memory = True
            return
        if not self.has_run and not bool(logits.isfinite().all()):
            raise ValueError(f"{self.model} gives outputs that are not finite: its times would mean nothing")
        self.has_run = True


def make_step(model: nn.Module, images: Tensor, *, mode: Mode, dtype: torch.dtype) -> Step:
    """One forward pass, or one training step without an optimizer: forward, sum, backward, drop the gradients.

    `images` are (B, 3, height, width). A `dtype` other than float32 means automatic mixed precision.
    """
    precision = None if dtype == torch.float32 else dtype

    def forward() -> Tensor:
        with torch.inference_mode(), autocast(images.device, precision):
            logits: Tensor = model(images)
        return logits

    def train() -> Tensor:
        try:
            with autocast(images.device, precision):
                logits: Tensor = model(images)
            logits.sum().backward()
        finally:
            model.zero_grad(set_to_none=True)
        return logits.detach()

    model.train(mode == "train")
    return {"forward": forward, "train": train}[mode]


def interleave(
    runners: Sequence[Runner],
    *,
    rounds: int,
    warmup: int,
    clock: Callable[[], float],
    report: Callable[[int], None],
) -> None:
    """Time every runner once per round, in order, after `warmup` untimed steps each.

    Seconds are added to the runners as they are measured, so an interruption keeps them. A runner that runs out of
    memory is skipped from then on. `clock` returns seconds and waits for the device; `report` is called with the index
    of each round before it starts.
    """
    for _ in range(warmup):
        for runner in _remaining(runners):
            runner.run()
    for index in range(rounds):
        report(index)
        for runner in _remaining(runners):
            started = clock()
            runner.run()
            duration = clock() - started
            if not runner.is_out_of_memory:
                runner.seconds.append(duration)


def _remaining(runners: Sequence[Runner]) -> list[Runner]:
    return [runner for runner in runners if not runner.is_out_of_memory]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch (on a GPU or a CPU) or Python failed to allocate memory."""
    message = str(error)
    is_allocation = "can't allocate memory" in message or "CUDA out of memory" in message
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_allocation


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Keep GPUs from computing float32 products in TF32, and restore the setting afterwards."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
