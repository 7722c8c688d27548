"""How a trained classifier is used: the input it wants, its precision, batches that fit in memory."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from linvit.data.augment.build import InputSpec, resolve_input
from linvit.data.options import InputOptions
from linvit.device import autocast, autocast_dtype
from linvit.runs.folder import Classifier
from linvit.settings.fields import validate


def input_spec(
    classifier: Classifier, *, img_size: tuple[int, int] | None = None, given: Mapping[str, Any] | None = None
) -> InputSpec:
    """How images are prepared: as `given`, else as the run's settings say, else as the model says itself.

    Args:
        img_size: (height, width) in pixels; default the size that the model has now, whatever that of the run was.
        given: values for fields of InputOptions.

    Raises ValueError for a setting that is none, and a model that does not take RGB.
    """
    settings = {name: classifier.settings.get(name) for name in InputOptions.model_fields}
    return resolve_input(classifier.model, validate(InputOptions, {**settings, **(given or {}), "img_size": img_size}))


def amp_precision(classifier: Classifier, given: Mapping[str, Any] | None = None) -> torch.dtype | None:
    """The precision of automatic mixed precision, None is off: `amp` and `amp_dtype` as `given`, else as in the run."""
    settings = {"amp": False, "amp_dtype": "bfloat16", **classifier.settings, **(given or {})}
    return autocast_dtype(settings["amp"], settings["amp_dtype"])


class BatchForward:
    """A model's logits of one batch after the other; a batch that memory does not hold is halved, from then on.

    Args:
        model: in evaluation mode, on `device`.
        amp_dtype: precision of automatic mixed precision; None is off.
        say: takes a sentence when a batch has been halved.

    Attributes:
        size: images at once, at most; None where none were too many so far.
    """

    def __init__(
        self, model: nn.Module, *, device: torch.device, amp_dtype: torch.dtype | None, say: Callable[[str], object]
    ) -> None:
        self.model = model
        self.device = device
        self.amp_dtype = amp_dtype
        self.say = say
        self.size: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, C) in float32 of images (B, 3, H, W); ValueError where not even one image fits in memory."""
        logits = self._try(images)
        while logits is None:
            self._halve(images)
            logits = self._try(images)
        return logits

    # Not around the caller's loop: inside of a generator it would turn gradients off for the generator's user.
    @torch.no_grad()
    def _try(self, images: Tensor) -> Tensor | None:
        try:
            with autocast(self.device, self.amp_dtype):
                return torch.cat([self.model(part).float() for part in images.split(self.size or len(images))])
        except torch.OutOfMemoryError:
            return None

    def _halve(self, images: Tensor) -> None:
        before = min(self.size or len(images), len(images))
        if before == 1:
            height, width = images.shape[-2:]
            raise ValueError(
                f"a single image of {height}×{width} px does not fit in the memory of {self.device}: set a smaller "
                "--img-size, --amp, or --device cpu"
            )
        self.size = (before + 1) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"out of memory with {before} images at once: going on with {self.size}")


class ShardedForward:
    """Logits from a model whose weights are sharded; in an evaluation, all processes make the same number of calls.

    Each call gathers the weights block by block, for which all processes wait. One with fewer batches than others makes
    up for it with blank images.

    Args:
        model: in evaluation mode.
        amp_dtype: precision of automatic mixed precision; None is off.
        num_calls: the number of calls, of any process at most.
    """

    def __init__(
        self, model: nn.Module, *, device: torch.device, amp_dtype: torch.dtype | None, num_calls: int
    ) -> None:
        self.model, self.device, self.amp_dtype = model, device, amp_dtype
        self._calls_left = num_calls

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, C) in float32 of images (B, 3, H, W); ValueError if the batch does not fit in memory."""
        self._calls_left -= 1
        try:
            # As without sharding, compiled blocks are for training alone: figures must not depend on the compiler.
            with autocast(self.device, self.amp_dtype), torch.compiler.set_stance("force_eager"):
                logits: Tensor = self.model(images)
            return logits.float()
        except torch.OutOfMemoryError as error:
            # Halves would be calls that the other processes do not make.
            raise ValueError(
                f"memory ran out while evaluating {len(images)} images at once with sharded weights: set a lower "
                "--validation-batch-size"
            ) from error

    def finish(self, img_size: tuple[int, int]) -> None:
        """Make the calls that are left, on a blank image of that (height, width), and shard all weights again."""
        for _ in range(self._calls_left):
            self(torch.zeros(1, 3, *img_size, device=self.device))
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # Outside of training the outermost module keeps its weights gathered.
                module.reshard()
