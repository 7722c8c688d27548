"""Time steps of several models in turn, so that other load on the machine slows all of them alike."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from linvit.device import autocast
from linvit.output.files import reason
from linvit.settings.fields import Mode

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
