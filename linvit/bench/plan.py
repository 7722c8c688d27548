"""Groups of models to compare, and the rows of results.

Every model of every group is built on the meta device first, so that mistakes show before anything is timed. A row
holds the measurements of one model in one group, and what follows from them.
"""

import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from timm.models import VisionTransformer

from linvit.bench.options import Group
from linvit.measure.memory import StepMemory
from linvit.measure.timing import count_flops
from linvit.model.build import ModelSpec, build, parse_spec
from linvit.model.projected import ProjectedAttention
from linvit.model.projections import Projection
from linvit.model.transformer import LinformerTransformer
from linvit.output.cells import CsvWriter
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
    layers = [module for module in model.modules() if isinstance(module, ProjectedAttention)]
    pairs = [pair for pair in (layer.projections() for layer in layers) if pair is not None]
    lengths = {length for key, _ in pairs for length in key.lengths}
    # A set, since layers and heads may share parameters.
    own = {p for module in model.modules() if isinstance(module, Projection) for p in module.parameters()}
    return Facts(
        patches=model.patch_embed.num_patches,
        k=(min(lengths), max(lengths)) if len(lengths) > 1 else next(iter(lengths), None),
        kind=pairs[0][0].kind if pairs else FULL_ATTENTION,
        share=model.share if isinstance(model, LinformerTransformer) and pairs else "",
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_projection_parameters=sum(p.numel() for p in own),
    )


@dataclass(frozen=True)
class Row:
    """One model in one group; None where there is no value.

    Attributes:
        n: number of timed rounds.
        flops: floating-point operations of a step.
        seconds: median time of a step; `spread` is its range, `all_seconds` has every round.
        tokens_per_second: patches per second.
        ratio: how many times faster than the baseline, as the median over rounds of baseline / own time in the same
            round; `ratio_spread` is its range.
        peak_share: flops / seconds as a share of the speed of plain matrix products.
        step_bytes: extra memory of a step.
        process_bytes: peak memory of the whole process.
    """

    model: str
    baseline: str | None
    image_size: int | tuple[int, int]
    patches: int
    k: int | tuple[int, int] | None
    kind: str
    share: str
    num_parameters: int
    num_projection_parameters: int
    mode: Mode
    batch_size: int
    dtype: str
    compile: bool
    status: Literal["ok", "out of memory"]
    n: int
    flops: int
    seconds: float | None
    spread: tuple[float, float] | None
    images_per_second: float | None
    tokens_per_second: float | None
    ratio: float | None
    ratio_spread: tuple[float, float] | None
    peak_share: float | None
    step_bytes: int | None
    process_bytes: int | None
    all_seconds: list[float]


def make_row(
    model: str,
    group: Group,
    facts: Facts,
    *,
    flops: int,
    seconds: Sequence[float],
    baseline_seconds: Sequence[float],
    is_out_of_memory: bool,
    gemm_flops_per_second: float,
    memory: StepMemory | None,
) -> Row:
    """The row of a group's model, from its seconds and the baseline's in each round."""
    median = statistics.median(seconds) if seconds and not is_out_of_memory else None
    is_compared = len(group.models) > 1
    ratios = [base / own for base, own in zip(baseline_seconds, seconds)] if is_compared and median else []
    images_per_second = group.batch_size / median if median else None
    height, width = group.img_size
    return Row(
        model=model,
        baseline=group.models[0] if is_compared else None,
        image_size=height if height == width else group.img_size,
        **asdict(facts),
        mode=group.mode,
        batch_size=group.batch_size,
        dtype=group.dtype,
        compile=group.compile,
        status="out of memory" if is_out_of_memory else "ok",
        n=len(seconds),
        flops=flops,
        seconds=median,
        spread=(min(seconds), max(seconds)) if median else None,
        images_per_second=images_per_second,
        tokens_per_second=images_per_second * facts.patches if images_per_second else None,
        ratio=statistics.median(ratios) if ratios else None,
        ratio_spread=(min(ratios), max(ratios)) if ratios else None,
        peak_share=flops / median / gemm_flops_per_second if median else None,
        step_bytes=memory.step_bytes if memory else None,
        process_bytes=memory.process_bytes if memory else None,
        all_seconds=list(seconds),
    )


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with a header; the numbers of a pair or list are separated by spaces."""
    out = io.StringIO()
    writer = CsvWriter(out)
    writer.writerow(field.name for field in fields(Row))
    writer.writerows(map(_cell, asdict(row).values()) for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value
