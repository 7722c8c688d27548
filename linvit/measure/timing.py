"""Steps of models, timed in turn: whatever else the machine does falls on all alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from linvit.device import autocast
from linvit.output.files import reason
from linvit.settings.fields import Mode

Step = Callable[[], Tensor]


@dataclass
class Runner:
    """A model at work: its step, which returns the logits, and the seconds that its timed steps took."""

    model: str
    step: Step
    seconds: list[float] = field(default_factory=list)
    is_out_of_memory: bool = False
    has_run: bool = False

    def run(self) -> None:
        """One step. Raises ValueError, naming the model, where it fails otherwise than by running out of memory."""
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
    """One forward pass, or one training step without the optimizer: forward, sum, backward, gradients dropped.

    `images` are (B, 3, height, width); every `dtype` but float32 is automatic mixed precision.
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
    """Time every runner once a round, in their order, after `warmup` untimed steps each.

    Seconds are added to the runners as they are measured, so that an interruption keeps them; `clock` waits for the
    device. A runner that runs out of memory takes no further part. `report` is told each round before it starts.
    """
    for _ in range(warmup):
        for runner in _remaining(runners):
            runner.run()
    for index in range(rounds):
        report(index)
        for runner in _remaining(runners):
            started = clock()
            runner.run()
            taken = clock() - started
            if not runner.is_out_of_memory:
                runner.seconds.append(taken)


def _remaining(runners: Sequence[Runner]) -> list[Runner]:
    return [runner for runner in runners if not runner.is_out_of_memory]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a GPU or on a CPU, or Python failed to get memory."""
    words = str(error)
    is_allocation = "can't allocate memory" in words or "CUDA out of memory" in words
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_allocation
