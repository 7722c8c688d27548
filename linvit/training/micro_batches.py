"""Gradients of a batch that may not fit in memory: it is split in halves until its parts fit.

The gradients of the parts add up to those of the batch.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from linvit.distributed import Ranks
from linvit.training.fsdp import is_sharded


class MicroBatches:
    """Runs the forward and backward pass of batches in micro-batches of at most `size` images.

    If memory runs out during a backward pass, some gradients already include the failed micro-batch. Gradients that
    were empty before it are emptied again. If others changed, the halves of the micro-batch skip those parameters. So
    every gradient includes every image exactly once, without a second set of gradients kept in reserve. (With dropout,
    the halves draw their own masks.)

    Args:
        model: the module that exchanges gradients, if there are several processes.
        parameters: the parameters that accumulate gradients.
        forward: computes the model's outputs from images (b, 3, H, W).
        loss_of: computes the mean loss from outputs, images and labels.
        scaler: scales the loss.

    Attributes:
        size: the largest number of images at once; None as long as full batches fit.
        notes: a sentence per split, until the caller prints and clears them.
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
        """Whether batches may be split. With sharded weights the other processes wait for every forward pass."""
        return not is_sharded(self.model)

    def backward(self, images: Tensor, labels: Tensor, *, weight: float, sync_gradients: bool) -> Tensor:
        """Accumulate the gradients of a batch, images (B, 3, H, W); returns its loss, a detached scalar.

        Args:
            weight: weight of one image in the loss.
            sync_gradients: whether the processes average their gradients after this batch.

        Raises ValueError if a single image does not fit in memory.
        """
        return self._accumulate(images, labels, weight=weight, sync_gradients=sync_gradients, skipped=frozenset())

    def use_smallest(self, sizes: list[int]) -> None:
        """Use the smallest of the sizes of all processes, where 0 stands for full batches."""
        limits = [size for size in sizes if size]
        smallest = min(limits) if limits else None
        if smallest != self.size:
            self.notes.append(f"another process ran out of memory: splitting into {smallest} images at a time here too")
        self.size = smallest

    def _accumulate(
        self, images: Tensor, labels: Tensor, *, weight: float, sync_gradients: bool, skipped: frozenset[nn.Parameter]
    ) -> Tensor:
        """`backward` without the `skipped` parameters, whose gradients already include these images."""
        total = torch.zeros((), device=images.device)
        start = 0
        while start < len(images):
            stop = min(start + (self.size or len(images)), len(images))
            part = images[start:stop], labels[start:stop]
            is_last = sync_gradients and stop == len(images)
            is_synced = not self.can_split or (is_last and isinstance(self.model, DistributedDataParallel))
            result = self._try_backward(*part, weight=weight, is_synced=is_synced, skipped=skipped)
            if isinstance(result, frozenset):
                self._halve(stop - start, images)
                if not result:
                    continue
                result = self._accumulate(*part, weight=weight, sync_gradients=is_last, skipped=skipped | result)
            total += result
            start = stop
        return total

    def _try_backward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        weight: float,
        is_synced: bool,
        skipped: frozenset[nn.Parameter],
    ) -> Tensor | frozenset[nn.Parameter]:
        """The loss; if memory ran out, the parameters whose gradients include the images nevertheless."""
        before = [(parameter, parameter.grad, _version(parameter.grad)) for parameter in self.parameters]
        generators = _generator_states(images.device)
        is_forward_done = False
        try:
            with self._gradient_sync(is_synced), _skip_gradients(skipped):
                outputs = self.forward(images)
                is_forward_done = True
                loss = self.loss_of(outputs, images, labels) * (weight * len(images))
                self.scaler.scale(loss).backward()
        except torch.OutOfMemoryError as error:
            if not self.can_split or (is_synced and is_forward_done):
                # The other processes wait for weights, or some gradients have been exchanged already.
                raise ValueError(
                    f"memory ran out with {len(images)} images at once while processes exchanged weights or gradients: "
                    "set a lower --batch-size (with a higher --grad-accum-steps for the same total batch), or "
                    "--grad-checkpointing"
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
                "--grad-checkpointing, a smaller --img-size or a smaller --model (a lower --batch-size does not help)"
            )
        self.size = (num_images + 1) // 2
        self.notes.append(
            f"out of memory with {num_images} images at once: splitting batches into {self.size} images at a time; "
            "the batch size stays the same"
        )

    def _gradient_sync(self, is_synced: bool) -> AbstractContextManager[None]:
        if isinstance(self.model, DistributedDataParallel) and not is_synced:
            return self.model.no_sync()
        return nullcontext()


def _version(gradient: Tensor | None) -> int:
    """The number of in-place changes of a gradient."""
    return 0 if gradient is None else gradient._version


def _undo(before: list[tuple[nn.Parameter, Tensor | None, int]]) -> list[nn.Parameter]:
    """Empty the gradients that were empty before; returns the parameters whose other gradients changed."""
    changed = []
    for parameter, gradient, version in before:
        if gradient is None:
            parameter.grad = None
        elif parameter.grad is not gradient or gradient._version != version:
            changed.append(parameter)
    return changed


@contextmanager
def _skip_gradients(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Add nothing to the gradients of these parameters."""
    # Changing `requires_grad` would recompile a compiled model.
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
