"""Measure groups of models: check them, time them in turn, measure their memory, and collect the results.

A model's first Linformer layer is checked against the equations in linvit.reference before it is timed.
"""

import copy
import gc
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linvit import reference
from linvit.bench.options import BenchOptions, Group
from linvit.bench.output import save_plot
from linvit.bench.plan import FULL_ATTENTION, Plan, Row, make_row, to_csv
from linvit.measure.memory import (
    OutOfMemory,
    StepMemory,
    can_read_peaks,
    cuda_step_memory,
    step_memory_in_subprocess,
)
from linvit.measure.provenance import provenance
from linvit.measure.timing import Runner, gemm_flops_per_second, interleave, make_step
from linvit.model.attention import LinformerAttention
from linvit.model.build import ModelSpec, build
from linvit.model.eva import rotary_of_layers
from linvit.model.projected import ProjectedAttention
from linvit.model.projections import MatrixProjection, Projection
from linvit.model.rotary import RotaryAttention
from linvit.output.files import json_text, write_text
from linvit.output.streams import is_stream
from linvit.output.terminal import note
from linvit.settings.flags import UsageError

# With more patches, the reference takes long for a dense E.
MAX_PATCHES = 4096
FLOAT64_BOUND = 1e-10
FLOAT32_BOUND = 1e-3


class Check(NamedTuple):
    """A comparison: its name, its image size, and the largest difference as a share of the largest value."""

    model: str
    image_size: tuple[int, int]
    compared: str
    largest_difference: float
    bound: float


def size_to_check(spec: ModelSpec, img_size: tuple[int, int]) -> tuple[int, int]:
    """The image size, halved until it has at most 4,096 patches or the model cannot be built any smaller."""
    while build(spec, img_size, device="meta").patch_embed.num_patches > MAX_PATCHES:
        half = (img_size[0] // 2, img_size[1] // 2)
        try:
            build(spec, half, device="meta")
        except UsageError:
            break
        img_size = half
    return img_size


def check_attention(spec: ModelSpec, img_size: tuple[int, int]) -> Check | None:
    """Compare the output and input gradient of a model's first Linformer layer; None if it has no such layer.

    Raises ValueError, naming the model, if the difference is too large.
    """
    model = build(spec, img_size)
    layers = [m for m in model.modules() if isinstance(m, ProjectedAttention)]
    number = next((index for index, layer in enumerate(layers) if layer.projections() is not None), None)
    if number is None:
        return None
    layer = copy.deepcopy(layers[number]).eval()
    rope = rotary_of_layers(model)[number]
    projections = layer.projections()
    assert projections is not None
    num_tokens = layer.num_prefix_tokens + model.patch_embed.num_patches
    x = torch.randn(1, num_tokens, model.embed_dim, generator=torch.Generator().manual_seed(0))
    if all(isinstance(projection, MatrixProjection) for projection in projections):
        compared, bound = "first Linformer layer and linvit.reference, both in float64", FLOAT64_BOUND
        layer.double()
        table = None if rope is None else rope.double()
        functions = _forward(layer, table), lambda y: _reference(layer, y, table)
        found, expected = (_with_gradient(function, x.double()) for function in functions)
    else:
        compared, bound = "first Linformer layer, float32 and, associative, in float64", FLOAT32_BOUND
        precise = copy.deepcopy(layer).double()
        precise.order = "associative"
        found, expected = (_with_gradient(_forward(own, rope), y) for own, y in ((layer, x), (precise, x.double())))
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected))
    # NaN must fail too, so the test is not `difference > bound`.
    if not difference <= bound:
        raise ValueError(
            f"{spec.text} is not timed: its attention differs from the reference by {difference:.1e} "
            f"(rounding explains at most {bound:.0e}), so it computes something else"
        )
    return Check(spec.text, img_size, compared, difference, bound)


def _with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """`function(x)`, and the gradient of its product with a fixed random tensor with respect to x."""
    x = x.clone().requires_grad_()
    y = function(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(y, x, direction.to(y.dtype))
    return y.detach(), gradient


def _forward(layer: nn.Module, rope: Tensor | None) -> Callable[[Tensor], Tensor]:
    return layer if rope is None else partial(layer, rope=rope)


def _reference(layer: ProjectedAttention, x: Tensor, rope: Tensor | None) -> Tensor:
    projections = layer.projections()
    assert projections is not None
    assert isinstance(layer.proj, nn.Linear)
    E, F = (_head_matrices(projection, layer.num_heads) for projection in projections)
    common: dict[str, Any] = {
        "out_weight": layer.proj.weight,
        "out_bias": layer.proj.bias,
        "E": E,
        "F": F,
        "num_prefix_tokens": layer.num_prefix_tokens,
    }
    if isinstance(layer, LinformerAttention):
        return reference.linformer_attention(x, qkv_weight=layer.qkv.weight, qkv_bias=layer.qkv.bias, **common)
    assert isinstance(layer, RotaryAttention)
    return reference.rotary_linformer_attention(
        x,
        q=layer.head_layers("q"),
        k=layer.head_layers("k"),
        v=layer.head_layers("v"),
        R=layer.rotations(rope, num_patches=E[0].shape[1]).to(x.dtype),
        normalise=(layer.q_norm, layer.k_norm),
        norm=layer.norm,
        **common,
    )


def _head_matrices(projection: Projection, num_heads: int) -> list[Tensor]:
    """E of every head, each (k of the head, N)."""
    assert isinstance(projection, MatrixProjection)
    matrices = projection.matrix().expand(num_heads, -1, -1)
    lengths = projection.lengths * (num_heads // len(projection.lengths))
    return [matrix[:length] for matrix, length in zip(matrices, lengths)]


@dataclass
class Results:
    """Everything measured so far; an interruption leaves the rows that are complete."""

    command: str
    # Provenance of the numbers. The commit is read before the first of them, since files may change meanwhile.
    origin: dict[str, Any] = field(init=False)
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    # Operations per second of plain matrix products by dtype, as measured around the last group.
    gemm_flops_per_second: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.origin = provenance(self.command, seed=0, n=0)

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        rounds = sorted({row.n for row in self.rows if row.status == "ok"})
        return {
            **self.origin,
            "n": rounds[0] if len(rounds) == 1 else rounds,
            "dtype": sorted({row.dtype for row in self.rows}),
            "gemm_flops_per_second": self.gemm_flops_per_second,
            "checks": [check._asdict() for check in self.checks],
            "notes": self.notes,
            "rows": [asdict(row) for row in self.rows],
        }

    def write(self, options: BenchOptions, *, streams: bool) -> None:
        """Write the files that the options name, or the pipes among them; without a measured row, write nothing.

        The plot carries the SHA-256 of the JSON text.
        """
        if not self.rows:
            return
        text = json_text(self.to_dict())
        if options.json_file is not None and is_stream(options.json_file) == streams:
            write_text(options.json_file, text)
        if options.csv_file is not None and is_stream(options.csv_file) == streams:
            write_text(options.csv_file, to_csv(self.rows))
        if options.plot_file is not None and is_stream(options.plot_file) == streams:
            save_plot(json.loads(text), options.plot_file, digest=hashlib.sha256(text.encode()).hexdigest())


class Bench:
    """Measures the groups of a plan on a device, and adds what it finds to `results`."""

    def __init__(self, plan: Plan, results: Results, device: torch.device) -> None:
        self.plan = plan
        self.results = results
        self.device = device
        self._checked: set[tuple[str, str, tuple[int, int]]] = set()

    def measure(self, group: Group) -> list[Row]:
        """Measure one group and return its rows, which are also added to the results, even after an interruption.

        Raises ValueError, naming the model, if one does not compute Linformer attention, or fails.
        """
        self._check(group)
        # Measured again before and after each group, since the speed of a shared machine varies.
        gemm_before = self._gemm_flops_per_second(group)
        self.results.gemm_flops_per_second[group.dtype] = gemm_before
        memory: dict[str, StepMemory] = {}
        runners = self._build(group)
        try:
            interleave(
                runners,
                rounds=group.rounds,
                warmup=group.warmup,
                clock=self._clock,
                report=lambda index: note(f"{group.title}: round {index + 1} of {group.rounds}"),
            )
            gemm = max(gemm_before, self._gemm_flops_per_second(group))
            self.results.gemm_flops_per_second[group.dtype] = gemm
            if self.device.type == "cuda":
                memory |= {r.model: cuda_step_memory(r.run) for r in runners if not r.is_out_of_memory}
            else:
                self._measure_cpu_memory(group, memory)
        finally:
            has_result = [runner for runner in runners if runner.seconds or runner.is_out_of_memory]
            rows = [self._row(runner, group, runners[0], memory) for runner in has_result]
            self.results.rows += rows
            del runners, has_result
            self._clean_up(group)
        return rows

    def _check(self, group: Group) -> None:
        """Check every model's attention; models that differ only in what they recompute are checked once."""
        for model in group.models:
            spec, facts = self.plan.specs[model], self.plan.facts[model, group.img_size]
            if facts.kind == FULL_ATTENTION:
                continue
            size = group.img_size if facts.patches <= MAX_PATCHES else size_to_check(spec, group.img_size)
            key = (spec.name, str(spec.kwargs), size)
            if key not in self._checked:
                note(f"{group.title}: checking {model}")
                check = check_attention(spec, size)
                assert check is not None
                self.results.checks.append(check)
                self._checked.add(key)

    def _build(self, group: Group) -> list[Runner]:
        images = torch.randn(group.batch_size, 3, *group.img_size, generator=torch.Generator().manual_seed(0))
        images = images.to(self.device)
        runners = []
        for name in group.models:
            model: nn.Module = build(self.plan.specs[name], group.img_size).to(self.device)
            if group.compile:
                model.compile()
            step = make_step(model, images, mode=group.mode, dtype=getattr(torch, group.dtype))
            runners.append(Runner(name, step))
        return runners

    def _measure_cpu_memory(self, group: Group, memory: dict[str, StepMemory]) -> None:
        """Add to `memory`, in a subprocess each, the models whose memory the group asks for."""
        if group.memory and not can_read_peaks():
            self._note("memory is not measured: on a CPU this needs Linux's /proc")
            return
        for model in group.memory:
            note(f"{group.title}: memory of {model}")
            try:
                memory[model] = step_memory_in_subprocess(
                    model, group.img_size, mode=group.mode, batch_size=group.batch_size, dtype=group.dtype
                )
            except OutOfMemory:
                self._note(f"{group.title}: {model} ran out of memory while its memory was measured")

    def _row(self, runner: Runner, group: Group, baseline: Runner, memory: dict[str, StepMemory]) -> Row:
        return make_row(
            runner.model,
            group,
            self.plan.facts[runner.model, group.img_size],
            flops=self.plan.flops(runner.model, group),
            seconds=runner.seconds,
            baseline_seconds=baseline.seconds,
            is_out_of_memory=runner.is_out_of_memory,
            gemm_flops_per_second=self.results.gemm_flops_per_second[group.dtype],
            memory=memory.get(runner.model),
        )

    def _gemm_flops_per_second(self, group: Group) -> float:
        return gemm_flops_per_second(getattr(torch, group.dtype), self.device, clock=self._clock)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _note(self, text: str) -> None:
        """Print a remark, and record it in the results, once."""
        if text not in self.results.notes:
            self.results.notes.append(text)
            note(text)

    def _clean_up(self, group: Group) -> None:
        """Free the group's models and compiled code before the next group."""
        gc.collect()
        if group.compile:
            torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
