"""A batch in parts: where one does not fit in memory it is halved, and their gradients still add up to the batch's."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from linvit.training.distributed import Ranks
from linvit.training.sharding import is_sharded


class MicroBatches:
    """Runs batches through a model forwards and backwards, in parts of at most `size` images.

    Gradients that earlier batches left are never lost, nor is a part counted twice that ran out of memory half way.

    Args:
        model: what exchanges gradients where there are several processes.
        parameters: those whose gradients are added up.
        forward: from images (b, 3, H, W) to the model's outputs.
        loss_of: from outputs, images and labels to their mean loss.
        scaler: what the loss is scaled by.

    Attributes:
        size: images at once; None: whole batches, which have all fitted so far.
        notes: a sentence for each halving, until they are told.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        *,
        forward: Callable[[Tensor], Any],
        loss_of: Callable[[Any, Tensor, Tensor], Tensor],
        scaler: torch.amp.GradScaler,
        ranks: Ranks,
    ) -> None:
        self.model, self.parameters, self.forward, self.loss_of = model, parameters, forward, loss_of
        self.scaler, self.ranks = scaler, ranks
        self.size: int | None = None
        self.notes: list[str] = []

    @property
    def can_split(self) -> bool:
        """Whether a batch may run in parts: not where every part is waited for by the other processes."""
        return not is_sharded(self.model)

    def backward(self, images: Tensor, labels: Tensor, *, weight: float, exchanges: bool) -> Tensor:
        """Add the gradients of a batch, images (B, 3, H, W), to the parameters'; returns its loss, a detached scalar.

        Args:
            weight: of one image in the loss.
            exchanges: whether processes average their gradients with this batch.

        Raises ValueError where a single image does not fit.
        """
        total = torch.zeros((), device=images.device)
        start = 0
        while start < len(images):
            stop = min(start + (self.size or len(images)), len(images))
            part = images[start:stop], labels[start:stop]
            is_last = exchanges and stop == len(images)
            is_exchanged = not self.can_split or (is_last and isinstance(self.model, DistributedDataParallel))
            loss = self._attempt(*part, weight=weight, is_exchanged=is_exchanged)
            if loss is None:
                self._halve(stop - start, images)
            else:
                total += loss
                start = stop
        return total

    def agree(self, sizes: list[int]) -> None:
        """Go on with the smallest of all processes' sizes, in which 0 is a whole batch."""
        limits = [size for size in sizes if size]
        smallest = min(limits) if limits else None
        if smallest != self.size:
            self.notes.append(f"another process is out of memory: going on with {smallest} images at a time here too")
        self.size = smallest

    def _attempt(self, images: Tensor, labels: Tensor, *, weight: float, is_exchanged: bool) -> Tensor | None:
        """The part's loss, its gradients added; None where it did not fit, and nothing is changed."""
        # An exchange averages all that has been added up, so that it must find it in place.
        held = None if is_exchanged else self._set_gradients_aside()
        generators = _generator_states(images.device)
        has_answered = False
        try:
            with self._gradient_exchange(is_exchanged):
                outputs = self.forward(images)
                has_answered = True
                loss = self.loss_of(outputs, images, labels) * (weight * len(images))
                self.scaler.scale(loss).backward()
        except torch.OutOfMemoryError as error:
            if not self.can_split or (is_exchanged and has_answered):
                # The other processes are waiting for weights, or for gradients that are exchanged in part already.
                raise ValueError(
                    f"memory ran out with {len(images)} images at once while processes exchanged weights or gradients: "
                    "set a lower --batch-size (--grad-accum-steps keeps the whole), or --grad-checkpointing"
                ) from error
            if held is not None:
                self._put_back(held)
            _restore_generators(generators, images.device)
            return None
        if held is not None:
            self._add_to(held)
        return loss.detach()

    def _halve(self, num_images: int, images: Tensor) -> None:
        if images.device.type == "cuda":
            torch.cuda.empty_cache()
        height, width = images.shape[-2:]
        if num_images == 1:
            raise ValueError(
                f"a single image of {height}×{width} px does not fit in the memory of {self.ranks.device}: set "
                "--grad-checkpointing, a smaller --img-size or a smaller --model (a lower --batch-size saves no more)"
            )
        self.size = (num_images + 1) // 2
        self.notes.append(
            f"out of memory with {num_images} images at once: going on with {self.size} at a time, in batches as before"
        )

    def _gradient_exchange(self, is_exchanged: bool) -> AbstractContextManager[None]:
        if isinstance(self.model, DistributedDataParallel) and not is_exchanged:
            return self.model.no_sync()
        return nullcontext()

    def _set_gradients_aside(self) -> list[Tensor | None]:
        held = [parameter.grad for parameter in self.parameters]
        self._put_back([None] * len(held))
        return held

    def _put_back(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient

    def _add_to(self, held: list[Tensor | None]) -> None:
        """Make the gradients those held plus those there are now."""
        sums, added = [], []
        for parameter, before in zip(self.parameters, held):
            if before is None:
                continue
            if parameter.grad is not None:
                sums.append(before)
                added.append(parameter.grad)
            parameter.grad = before
        if sums:
            torch._foreach_add_(sums, added)


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _restore_generators(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
