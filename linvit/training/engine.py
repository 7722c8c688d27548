"""One step of training: forward and backward over a group of batches, then a single update of the weights."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from linvit.timmmodel import TimmModel
from linvit.training.config import TrainConfig
from linvit.training.distributed import Ranks, sum_over_ranks
from linvit.training.precision import autocast, autocast_dtype
from linvit.training.signals import StopRequest


class NonFiniteLossError(ValueError):
    """The loss is NaN or infinite; no weight has been touched by it."""


class Update(NamedTuple):
    """What an update reports."""

    # Mean over the group's batches and all processes.
    loss: float
    # Whether any process was asked to stop; all processes read the same.
    stop: bool


class TrainStep:
    """Turns batches into updates: `backward` for each batch of a group, then `update` once.

    Args:
        model: what is called, compiled and wrapped as it may be.
        plain_model: the same weights, bare; what the average follows.
        optimizer, scheduler, ema, mixup, loss_fn: as the other parts of `linvit.training` build them.
        config: precision and clipping.
        stop: the wish to stop that updates share between processes.
    """

    def __init__(
        self,
        model: nn.Module,
        plain_model: TimmModel,
        *,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler | None,
        ema: ModelEmaV3 | None,
        mixup: Mixup | None,
        loss_fn: nn.Module,
        config: TrainConfig,
        ranks: Ranks,
        stop: StopRequest,
    ) -> None:
        self.model, self.plain_model = model, plain_model
        self.optimizer, self.scheduler, self.ema = optimizer, scheduler, ema
        self.mixup, self.loss_fn = mixup, loss_fn.to(ranks.device)
        self.config, self.ranks, self.stop = config, ranks, stop
        self.amp_dtype = autocast_dtype(config.amp, config.amp_dtype)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.amp_dtype is torch.float16)
        self.clipped_parameters = _clipped_parameters(plain_model, config.clip_mode)
        self.num_updates = 0
        # Updates that the fp16 loss scaler left out because the scaled gradients overflowed.
        self.num_skipped = 0
        self._loss = torch.zeros((), device=ranks.device)
        self._read_report: Callable[[], list[float]] = lambda: [math.nan, 0.0]

    @property
    def weights(self) -> dict[str, TimmModel]:
        """The models to evaluate: "raw", and "ema" where there is a moving average."""
        return {"raw": self.plain_model} | ({"ema": self.ema.module} if self.ema is not None else {})

    def start_epoch(self, epoch: int) -> None:
        """Train from here on, with mixing unless `mixup_off_epoch` has come."""
        self.plain_model.train()
        if self.mixup is not None:
            self.mixup.mixup_enabled = not 0 < self.config.mixup_off_epoch <= epoch

    def end_epoch(self, epoch: int) -> None:
        """Move schedules that go by epochs, and average what batch norms have seen over processes."""
        if self.ranks.world_size > 1:
            distribute_bn(self.plain_model, self.ranks.world_size, reduce=True)
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1)

    def backward(self, images: Tensor, labels: Tensor, *, group_size: int, closes_group: bool) -> None:
        """Add a batch's gradients: images (B, 3, H, W), labels (B,); its loss is 1/`group_size` of the update's."""
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        with self._gradient_exchange(closes_group):
            with autocast(self.ranks.device, self.amp_dtype):
                logits = self.model(images)
            loss = self.loss_fn(logits.float(), labels) / group_size
            self._loss += loss.detach()
            if closes_group:
                self._read_report = self._send_report()
            self.scaler.scale(loss).backward()

    def update(self) -> Update:
        """Change the weights by the gradients of the group.

        Raises NonFiniteLossError, in every process and before anything is changed, where the loss is not finite.
        """
        loss, stop = self._read_report()
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss became {loss} at update {self.num_updates + 1}; the weights were left as they were before. "
                "Try a lower --lr, --clip-grad 1 or --amp-dtype bfloat16, and go on from the last state with --resume"
            )
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.clipped_parameters, self.config.clip_grad, mode=self.config.clip_mode)
        if self._step_optimizer():
            self.num_updates += 1
            if self.ema is not None:
                self.ema.update(self.plain_model, step=self.num_updates)
            if self.scheduler is not None:
                self.scheduler.step_update(self.num_updates)
        else:
            self.num_skipped += 1
        self.optimizer.zero_grad()
        return Update(loss, stop=stop > 0)

    def _step_optimizer(self) -> bool:
        """Step, unless the loss scaler finds an overflow; whether the step was taken."""
        if not self.scaler.is_enabled():
            self.optimizer.step()
            return True
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def _send_report(self) -> Callable[[], list[float]]:
        """Sum the group's loss over processes and send it to the host while backward still runs."""
        stop = torch.full_like(self._loss, float(self.stop.signal_number > 0))
        report = sum_over_ranks(torch.stack([self._loss / self.ranks.world_size, stop]))
        self._loss = torch.zeros_like(self._loss)
        return read_early(report)

    def _gradient_exchange(self, closes_group: bool) -> AbstractContextManager[None]:
        """Processes average their gradients once, with the last batch of a group."""
        if isinstance(self.model, DistributedDataParallel) and not closes_group:
            return self.model.no_sync()
        return nullcontext()


def read_early(values: Tensor) -> Callable[[], list[float]]:
    """Start copying to the host; the call returned waits for that copy alone, not for work queued after it."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return wait


def _clipped_parameters(model: TimmModel, clip_mode: str) -> list[nn.Parameter]:
    # Adaptive clipping spares the classifier (Brock et al. 2021, section 4.1).
    spared = {id(parameter) for parameter in model.get_classifier().parameters()} if clip_mode == "agc" else set()
    return [parameter for parameter in model.parameters() if id(parameter) not in spared]
