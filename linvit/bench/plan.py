"""Build every model of every group on the meta device, so that mistakes show before anything is timed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from timm.models import VisionTransformer

from linvit.bench.options import Group
from linvit.measure.flops import count_flops
from linvit.model.attention import LinformerAttention
from linvit.model.build import ModelSpec, build, parse_spec
from linvit.model.projections import Projection
from linvit.model.vit import LinformerViT
from linvit.output.files import reason
from linvit.settings.fields import Mode
from linvit.settings.flags import UsageError

FULL_ATTENTION = "full attention"

HeightWidth = tuple[int, int]


@dataclass(frozen=True)
class Facts:
    """Size and projections of a model at one image size.

    `k` is the projected length, (lowest, highest) if it varies, or None for full attention.
    `num_projection_parameters` is the part of `num_parameters` in E and F.
    """

    patches: int
    k: int | tuple[int, int] | None
    kind: str
    share: str
    num_parameters: int
    num_projection_parameters: int


class Plan:
    """The groups to measure, with the facts and FLOPs of their models.

    Raises UsageError, naming the model, if one cannot be built or cannot run a step.
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
        """Floating-point operations of one step of a group's model, without recomputation."""
        return self._flops[model, group.img_size, group.mode, group.batch_size]

    def halve(self, group: Group) -> Group | None:
        """Insert the group at half its batch size behind it; None if that is already planned or impossible."""
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
                # Recomputation saves memory but does no additional work.
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
            raise UsageError(f"{model} cannot run a step of {group.title}: {reason(error)}") from error


def describe(model: VisionTransformer) -> Facts:
    """The facts of a Vision Transformer at its image size."""
    layers = [module for module in model.modules() if isinstance(module, LinformerAttention)]
    pairs = [pair for pair in (layer.projections() for layer in layers) if pair is not None]
    lengths = {length for key, _ in pairs for length in key.lengths}
    # A set, since layers and heads may share parameters.
    own = {p for module in model.modules() if isinstance(module, Projection) for p in module.parameters()}
    return Facts(
        patches=model.patch_embed.num_patches,
        k=(min(lengths), max(lengths)) if len(lengths) > 1 else next(iter(lengths), None),
        kind=pairs[0][0].kind if pairs else FULL_ATTENTION,
        share=model.share if isinstance(model, LinformerViT) and pairs else "",
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_projection_parameters=sum(p.numel() for p in own),
    )
