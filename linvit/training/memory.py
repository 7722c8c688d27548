"""A batch in parts: where one does not fit in memory it is halved, and their gradients still add up to the batch's."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from linvit.distributed import Ranks
from linvit.training.fsdp import is_sharded


class MicroBatches:
    """Runs batches through a model forwards and backwards, in parts of at most `size` images.

    A part that runs out of memory halfway through its backward pass has changed some gradients already. Those that were
    empty before are emptied again. If others have changed, the part is repeated in halves that add nothing to them:
    each gradient gets the share of each image exactly once, and no second set of gradients is held in case memory runs
    out. (With dropout, the halves draw masks of their own.)

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
        return self._add_gradients(images, labels, weight=weight, exchanges=exchanges, complete=frozenset())

    def _add_gradients(
        self, images: Tensor, labels: Tensor, *, weight: float, exchanges: bool, complete: frozenset[nn.Parameter]
    ) -> Tensor:
        """`backward`, except for the `complete` parameters, which have the gradients of these images."""
        total = torch.zeros((), device=images.device)
        start = 0
        while start < len(images):
            stop = min(start + (self.size or len(images)), len(images))
            part = images[start:stop], labels[start:stop]
            is_last = exchanges and stop == len(images)
            is_exchanged = not self.can_split or (is_last and isinstance(self.model, DistributedDataParallel))
            result = self._attempt(*part, weight=weight, is_exchanged=is_exchanged, complete=complete)
            if isinstance(result, frozenset):
                self._halve(stop - start, images)
                if not result:
                    continue
                result = self._add_gradients(*part, weight=weight, exchanges=is_last, complete=complete | result)
            total += result
            start = stop
        return total

    def agree(self, sizes: list[int]) -> None:
        """Go on with the smallest of all processes' sizes, in which 0 is a whole batch."""
        limits = [size for size in sizes if size]
        smallest = min(limits) if limits else None
        if smallest != self.size:
            self.notes.append(f"another process is out of memory: going on with {smallest} images at a time here too")
        self.size = smallest

    def _attempt(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        weight: float,
        is_exchanged: bool,
        complete: frozenset[nn.Parameter],
    ) -> Tensor | frozenset[nn.Parameter]:
        """The part's loss; if memory ran out, the parameters that have the part's gradient nevertheless."""
        before = [(parameter, parameter.grad, _version(parameter.grad)) for parameter in self.parameters]
        generators = _generator_states(images.device)
        has_answered = False
        try:
            with self._gradient_exchange(is_exchanged), _leaving_out(complete):
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
            _restore_generators(generators, images.device)
            return frozenset(_undo(before))
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


def _version(gradient: Tensor | None) -> int:
    """How often a gradient was changed in place."""
    return 0 if gradient is None else gradient._version


def _undo(before: list[tuple[nn.Parameter, Tensor | None, int]]) -> list[nn.Parameter]:
    """Empty the gradients that were empty before; returns the parameters whose gradients have changed otherwise."""
    changed = []
    for parameter, gradient, version in before:
        if gradient is None:
            parameter.grad = None
        elif parameter.grad is not gradient or gradient._version != version:
            changed.append(parameter)
    return changed


@contextmanager
def _leaving_out(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Add nothing to the gradients of these parameters."""
    # Not by `requires_grad_(False)`, for which a compiled model is compiled again.
    hooks = [parameter.register_hook(torch.zeros_like) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _restore_generators(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
