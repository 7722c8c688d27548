"""A training step: forward and backward passes over a group of batches, then one update of the weights."""

import math
from typing import Any, Literal, NamedTuple

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from linvit.device import autocast, autocast_dtype
from linvit.distributed import Ranks, StopRequest, sum_over_ranks
from linvit.model.build import TimmModel
from linvit.training.config import TrainConfig
from linvit.training.distill import Distillation
from linvit.training.fsdp import full, is_sharded
from linvit.training.loss import mix
from linvit.training.micro_batches import MicroBatches

# What became of an update. Only the first changes any weight.
#   taken: the weights changed.
#   skipped: gradients overflowed float16, and the loss scaler lowered its scale.
#   refused: the loss or the gradients are not finite.
#   empty: no image of the group could be read.
Outcome = Literal["taken", "skipped", "refused", "empty"]


class Update(NamedTuple):
    """The result of an update. `bad_batches` and `notes` are of this process; the rest is the same in all."""

    outcome: Outcome
    # Mean over the images of the group in all processes.
    loss: float
    # Norm of all gradients before clipping.
    gradient_norm: float
    # Whether any process received a stop signal.
    stop: bool
    # Indices in the group of the batches whose own loss is not finite.
    bad_batches: tuple[int, ...]
    # Messages about memory.
    notes: tuple[str, ...]

    @property
    def has_loss(self) -> bool:
        """Whether the loss is finite and may be averaged with others."""
        return self.outcome in ("taken", "skipped")


class TrainStep:
    """Turns batches into updates: call `backward` for each batch of a group, then `update` once.

    Every image of a group has the same weight, even if some batches lack images or are split.

    Args:
        model: the module that is called, possibly compiled and wrapped.
        plain_model: the same weights without wrappers; the moving average follows it.
        optimizer, scheduler, ema, mixup, loss_fn: as built by the other modules of `linvit.training`.
        config: precision and clipping.
        stop: the stop request of this process; updates share it between processes.
        distillation: the teacher's part; `model` is then its `trained`, possibly compiled and wrapped.
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
        distillation: Distillation | None = None,
    ) -> None:
        self.model, self.plain_model = model, plain_model
        self.optimizer, self.scheduler, self.ema = optimizer, scheduler, ema
        self.mixup, self.loss_fn = mixup, loss_fn.to(ranks.device)
        self.config, self.ranks, self.stop = config, ranks, stop
        self.amp_dtype = autocast_dtype(config.amp, config.amp_dtype)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.amp_dtype is torch.float16)
        self.distillation = distillation
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.micro_batches = MicroBatches(
            model, self.parameters, forward=self._forward, loss_of=self._loss_of, scaler=self.scaler, ranks=ranks
        )
        self.num_updates = 0
        # Updates that the loss scaler skipped because the scaled float16 gradients overflowed.
        self.num_skipped = 0
        # Of the group so far: each batch's part of the loss, and the number of images in this process.
        self._losses: list[Tensor] = []
        self._num_images = 0

    @property
    def weights(self) -> dict[str, TimmModel]:
        """The models that are evaluated and saved: "raw" and, if the run keeps a moving average, "ema"."""
        return {"raw": self.plain_model} | ({"ema": self.ema.module} if self.ema is not None else {})

    @property
    def is_sharded(self) -> bool:
        """Whether weights, gradients, optimizer state and moving average are sharded over the processes."""
        return is_sharded(self.model)

    def to_evaluate(self, name: str) -> nn.Module:
        """The module that evaluates the weights called `name`."""
        # Only the module that was sharded can gather its weights, and that may be a wrapper around the model.
        return self.model if self.is_sharded and name == "raw" else self.weights[name]

    def start_epoch(self, epoch: int) -> None:
        """Enter training mode, with mixup and CutMix until `mixup_off_epoch`."""
        self.plain_model.train()
        if self.mixup is not None:
            self.mixup.mixup_enabled = not 0 < self.config.mixup_off_epoch <= epoch

    def end_epoch(self, epoch: int) -> None:
        """Average batch-norm statistics over the processes, and advance a schedule that counts epochs."""
        if self.ranks.world_size > 1:
            distribute_bn(self.plain_model, self.ranks.world_size, reduce=True)
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1)

    def backward(self, images: Tensor, labels: Tensor, *, group_size: int, closes_group: bool) -> None:
        """Accumulate the gradients of a batch: images (B, 3, H, W), labels (B,).

        Args:
            images: B may be less than the batch size, even 0.
            group_size: number of batches in the group.
            closes_group: whether this is the last batch of the group.

        Raises ValueError if a single image does not fit in memory.
        """
        self._group_size = group_size
        self._num_images += len(images)
        weight = 1 / (self.config.images_per_batch * group_size)
        if not len(images):
            # Processes wait for each other at the last batch of a group, with sharded weights at every batch.
            is_collective = closes_group or self.is_sharded
            if not (is_collective and self.ranks.world_size > 1):
                self._losses.append(torch.zeros((), device=self.ranks.device))
                return
            # This process must take part, so it passes a blank image of weight 0.
            images, labels, weight = images.new_zeros(1, *images.shape[1:]), labels.new_zeros(1), 0.0
        if self.mixup is not None:
            images, labels = mix(self.mixup, images, labels)
        self._losses.append(self.micro_batches.backward(images, labels, weight=weight, sync_gradients=closes_group))

    def update(self) -> Update:
        """Update the weights with the gradients of the group, unless the loss or the gradients are not finite."""
        norm = self._gradient_norm()
        *sizes, loss, num_images, stop, gradient_norm = self._report(norm)
        self.micro_batches.use_smallest([int(size) for size in sizes])
        # Some images may be missing: the share of those that the group should have.
        share = num_images / (self.config.images_per_batch * self._group_size * self.ranks.world_size)
        outcome: Outcome = "taken"
        if share == 0:
            outcome = "empty"
        elif not math.isfinite(loss):
            outcome = "refused"
        elif not math.isfinite(gradient_norm):
            outcome = "skipped" if self._lowers_loss_scale() else "refused"
        scale = share * (self.scaler.get_scale() if outcome == "taken" else 1.0)
        if outcome == "taken":
            self._take_step(norm / scale, share=share)
        self.num_skipped += outcome == "skipped"
        bad_batches = self._bad_batches() if outcome == "refused" else ()
        notes = tuple(self.micro_batches.notes)
        self.micro_batches.notes.clear()
        self.optimizer.zero_grad()
        self._losses, self._num_images = [], 0
        return Update(outcome, loss / (share or 1.0), gradient_norm / (scale or 1.0), stop > 0, bad_batches, notes)

    def _forward(self, images: Tensor) -> Any:
        with autocast(self.ranks.device, self.amp_dtype):
            return self.model(images)

    def _loss_of(self, outputs: Any, images: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the images, from logits (B, C) or from the outputs that distillation needs."""
        if self.distillation is not None:
            return self.distillation.loss(outputs, images, labels, self.loss_fn)
        loss: Tensor = self.loss_fn(outputs.float(), labels)
        return loss

    def _gradient_norm(self) -> Tensor:
        """Norm of all gradients together, still scaled by the loss scaler; the same in all processes."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return full(get_total_norm(gradients)).to(self.ranks.device)

    def _report(self, norm: Tensor) -> list[float]:
        """The micro-batch size of each process, then the loss, images and stop requests of all, and `norm`.

        Everything is read from the device in one transfer.
        """
        world_size, rank = self.ranks.world_size, self.ranks.rank
        values = torch.zeros(world_size + 2)
        values[rank] = self.micro_batches.size or 0
        values[-2], values[-1] = self._num_images, float(self.stop.signal_number > 0)
        loss = torch.stack(self._losses).sum()
        on_device = values.to(norm.device, non_blocking=True)
        report = torch.cat([on_device[:-2], loss[None] / world_size, on_device[-2:]])
        if world_size > 1:
            sum_over_ranks(report)
        return torch.cat([report, norm[None]]).tolist()

    def _bad_batches(self) -> tuple[int, ...]:
        return tuple(torch.stack(self._losses).isfinite().logical_not().nonzero().flatten().tolist())

    def _lowers_loss_scale(self) -> bool:
        """Lower the scale of the loss scaler; returns whether that may make the gradients finite."""
        if not self.scaler.is_enabled():
            return False
        before = self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        self.scaler.update()
        # At a scale of 1 the scaler is not the cause.
        return before > 1 and self.scaler.get_scale() < before

    def _take_step(self, norm: Tensor, *, share: float) -> None:
        """Clip the gradients, step the optimizer, and advance moving average and schedule.

        `norm` is the norm of the gradients of the mean loss.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if share != 1:
            torch._foreach_mul_(gradients, 1 / share)
        clip_grad, clip_mode = self.config.clip_grad, self.config.clip_mode
        if clip_grad is not None and clip_mode == "norm":
            clip_grads_with_norm_(self.parameters, clip_grad, norm)
        elif clip_grad is not None:
            dispatch_clip_grad(self._parameters_to_clip(), clip_grad, mode=clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.num_updates += 1
        if self.ema is not None:
            self.ema.update(self.plain_model, step=self.num_updates)
        if self.scheduler is not None:
            self.scheduler.step_update(self.num_updates)

    def _parameters_to_clip(self) -> list[nn.Parameter]:
        if self.config.clip_mode != "agc":
            return self.parameters
        # Adaptive clipping leaves out the classifier (Brock et al. 2021, section 4.1).
        classifier = {id(parameter) for parameter in self.plain_model.get_classifier().parameters()}
        return [parameter for parameter in self.parameters if id(parameter) not in classifier]
