"""Every model of every group, built once without memory: mistakes show before anything is timed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from timm.models import VisionTransformer

from linvit.attention import LinformerAttention
from linvit.bench.flops import count_flops
from linvit.bench.options import Mode
from linvit.bench.presets import Group
from linvit.bench.specs import ModelSpec, build, parse_spec
from linvit.commandline import UsageError
from linvit.files import reason
from linvit.projections import Projection
from linvit.vit import LinformerViT

FULL_ATTENTION = "full attention"

HeightWidth = tuple[int, int]


@dataclass(frozen=True)
class Facts:
    """What is known of a model at an image size: patches N, projection, parameters, of which E and F."""

    patches: int
    # One length, the lowest and the highest where they differ, or none.
    k: int | tuple[int, int] | None
    kind: str
    share: str
    num_parameters: int
    num_projection_parameters: int


class Plan:
    """The groups to measure, and what their models are.

    Raises UsageError, naming the model, for the first that cannot be built or cannot take a step.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self.specs: dict[str, ModelSpec] = {}
        self.facts: dict[tuple[str, HeightWidth], Facts] = {}
        self._models: dict[tuple[str, HeightWidth], VisionTransformer] = {}
        self._flops: dict[tuple[str, HeightWidth, Mode, int], int] = {}
        for group in self.groups:
            self._prepare(group)

    def flops(self, model: str, group: Group) -> int:
        """Floating-point operations of one step of a group's model, without any recomputation."""
        return self._flops[model, group.img_size, group.mode, group.batch_size]

    def halve(self, group: Group) -> Group | None:
        """The group at half its batch size, added behind it; None where that is planned already or impossible."""
        half = replace(group, batch_size=group.batch_size // 2)
        if half.batch_size == 0 or half in self.groups:
            return None
        self._prepare(half)
        self.groups.insert(self.groups.index(group) + 1, half)
        return half

    def _prepare(self, group: Group) -> None:
        for model in group.models:
            at_size = (model, group.img_size)
            if at_size not in self._models:
                self.specs[model] = parse_spec(model)
                built = build(self.specs[model], group.img_size, device="meta")
                # What is computed a second time, to save memory, is no work done.
                built.set_grad_checkpointing(False)
                self._models[at_size] = built
                self.facts[at_size] = describe(built)
            key = (*at_size, group.mode, group.batch_size)
            if key not in self._flops:
                self._flops[key] = self._count(model, group)

    def _count(self, model: str, group: Group) -> int:
        images = torch.empty(group.batch_size, 3, *group.img_size, device="meta")
        try:
            return count_flops(self._models[model, group.img_size], images, mode=group.mode)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise UsageError(f"{model} cannot take a step of {group.title}: {reason(error)}") from error


def describe(model: VisionTransformer) -> Facts:
    """Facts of a Vision Transformer."""
    layers = [module for module in model.modules() if isinstance(module, LinformerAttention)]
    pairs = [pair for pair in (layer.projections() for layer in layers) if pair is not None]
    lengths = sorted({length for key, _ in pairs for length in key.lengths})
    ends = (lengths[0], lengths[-1]) if lengths else None
    # A parameter that layers or heads share counts once.
    own = {p for module in model.modules() if isinstance(module, Projection) for p in module.parameters()}
    return Facts(
        patches=model.patch_embed.num_patches,
        k=ends[0] if ends and ends[0] == ends[1] else ends,
        kind=pairs[0][0].kind if pairs else FULL_ATTENTION,
        share=model.share if isinstance(model, LinformerViT) and pairs else "",
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_projection_parameters=sum(p.numel() for p in own),
    )
