"""One step of training: forward and backward over a group of batches, then a single update of the weights."""

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
from linvit.training.fsdp import is_sharded, whole
from linvit.training.loss import mix
from linvit.training.memory import MicroBatches

# taken: the weights have changed; skipped: gradients overflowed float16 and the loss scaler lowers its scale; refused:
# loss or gradients are not finite; empty: no image of the group could be read. All but the first change nothing.
Outcome = Literal["taken", "skipped", "refused", "empty"]


class Update(NamedTuple):
    """What an update reports; the same in all processes, except for what is said to be of this one."""

    outcome: Outcome
    # Mean over the group's images of all processes.
    loss: float
    # Norm of all gradients, before they are clipped.
    gradient_norm: float
    # Whether any process was asked to stop.
    stop: bool
    # Of the batches of this process, those whose own loss is not finite, counted from the start of the group.
    bad_batches: tuple[int, ...]
    # What this process has to say about memory.
    notes: tuple[str, ...]

    @property
    def has_loss(self) -> bool:
        """Whether the loss is a number that may be averaged with others."""
        return self.outcome in ("taken", "skipped")


class TrainStep:
    """Turns batches into updates: `backward` for each batch of a group, then `update` once.

    Every image of a group has the same weight, also where batches lack images or run in parts.

    Args:
        model: what is called, compiled and wrapped as it may be.
        plain_model: the same weights, bare; what the average follows.
        optimizer, scheduler, ema, mixup, loss_fn: as the other parts of `linvit.training` build them.
        config: precision and clipping.
        stop: the wish to stop that updates share between processes.
        distillation: what is learnt from a teacher; `model` is then its `trained`, compiled and wrapped.
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
        # Updates that the fp16 loss scaler left out because the scaled gradients overflowed.
        self.num_skipped = 0
        # Of the group so far: the shares of its batches in the loss, and its images in this process.
        self._losses: list[Tensor] = []
        self._num_images = 0

    @property
    def weights(self) -> dict[str, TimmModel]:
        """The models whose weights are evaluated and kept: "raw", and "ema" where there is a moving average."""
        return {"raw": self.plain_model} | ({"ema": self.ema.module} if self.ema is not None else {})

    @property
    def is_sharded(self) -> bool:
        """Whether weights, gradients, optimizer state and average are sharded over the processes."""
        return is_sharded(self.model)

    def to_evaluate(self, name: str) -> nn.Module:
        """The module to evaluate the weights of that name with."""
        # Sharded weights can be gathered only by the module that was sharded, which may be one around the model.
        return self.model if self.is_sharded and name == "raw" else self.weights[name]

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
        """Add a batch's gradients: images (B, 3, H, W), labels (B,); B may be less than the batch size, even 0."""
        self._group_size = group_size
        self._num_images += len(images)
        weight = 1 / (self.config.images_per_batch * group_size)
        if not len(images):
            # In a group only its last batch is waited for, with weights that are divided every one.
            is_waited_for = closes_group or self.is_sharded
            if not (is_waited_for and self.ranks.world_size > 1):
                self._losses.append(torch.zeros((), device=self.ranks.device))
                return
            # The other processes need this one to take part, with a blank image that does not count.
            images, labels, weight = images.new_zeros(1, *images.shape[1:]), labels.new_zeros(1), 0.0
        if self.mixup is not None:
            images, labels = mix(self.mixup, images, labels)
        self._losses.append(self.micro_batches.backward(images, labels, weight=weight, exchanges=closes_group))

    def update(self) -> Update:
        """Change the weights by the gradients of the group, unless loss or gradients are not finite."""
        norm = self._gradient_norm()
        *sizes, loss, num_images, stop, gradient_norm = self._report(norm)
        self.micro_batches.agree([int(size) for size in sizes])
        # Of the images that the group should have had.
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
        """Mean over the images: of the logits (B, C), or of what distillation has the model return."""
        if self.distillation is not None:
            return self.distillation.loss(outputs, images, labels, self.loss_fn)
        loss: Tensor = self.loss_fn(outputs.float(), labels)
        return loss

    def _gradient_norm(self) -> Tensor:
        """Of all gradients together, as the loss scaler left them; processes have the same ones."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return whole(get_total_norm(gradients)).to(self.ranks.device)

    def _report(self, norm: Tensor) -> list[float]:
        """Read at once: each process's size of parts, loss, images and wish to stop over all processes, and `norm`."""
        world_size, rank = self.ranks.world_size, self.ranks.rank
        told = torch.zeros(world_size + 2)
        told[rank] = self.micro_batches.size or 0
        told[-2], told[-1] = self._num_images, float(self.stop.signal_number > 0)
        loss = torch.stack(self._losses).sum()
        on_device = told.to(norm.device, non_blocking=True)
        report = torch.cat([on_device[:-2], loss[None] / world_size, on_device[-2:]])
        if world_size > 1:
            sum_over_ranks(report)
        return torch.cat([report, norm[None]]).tolist()

    def _bad_batches(self) -> tuple[int, ...]:
        return tuple(torch.stack(self._losses).isfinite().logical_not().nonzero().flatten().tolist())

    def _lowers_loss_scale(self) -> bool:
        """Have the loss scaler lower its scale; whether that may mend gradients which are not finite."""
        if not self.scaler.is_enabled():
            return False
        before = self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        self.scaler.update()
        # At a scale of 1 the gradients are their own: they would be the same without float16's scaling.
        return before > 1 and self.scaler.get_scale() < before

    def _take_step(self, norm: Tensor, *, share: float) -> None:
        """Clip, step, and move what follows the weights; `norm` is that of the gradients of the mean loss."""
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if share != 1:
            torch._foreach_mul_(gradients, 1 / share)
        clip_grad, clip_mode = self.config.clip_grad, self.config.clip_mode
        if clip_grad is not None and clip_mode == "norm":
            clip_grads_with_norm_(self.parameters, clip_grad, norm)
        elif clip_grad is not None:
            dispatch_clip_grad(self._clipped_one_by_one(), clip_grad, mode=clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.num_updates += 1
        if self.ema is not None:
            self.ema.update(self.plain_model, step=self.num_updates)
        if self.scheduler is not None:
            self.scheduler.step_update(self.num_updates)

    def _clipped_one_by_one(self) -> list[nn.Parameter]:
        # Adaptive clipping spares the classifier (Brock et al. 2021, section 4.1).
        is_adaptive = self.config.clip_mode == "agc"
        spared = {id(parameter) for parameter in self.plain_model.get_classifier().parameters()} if is_adaptive else ()
        return [parameter for parameter in self.parameters if id(parameter) not in spared]
