"""Rows of results: the measurements of one model in one group, and what follows from them."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from linvit.bench.options import Group
from linvit.bench.plan import Facts
from linvit.measure.memory import StepMemory
from linvit.settings.fields import Mode


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
    writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value
