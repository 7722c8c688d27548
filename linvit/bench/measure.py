"""One group: models built, checked, timed in turn, and their memory read."""

import contextlib
import gc
import sys
import time
from collections.abc import Iterator

import torch
from torch import nn

from linvit.bench.check import MOST_PATCHES, check_attention, size_to_check
from linvit.bench.memory import (
    OutOfMemory,
    StepMemory,
    can_read_peaks,
    cuda_step_memory,
    step_memory_of_own_process,
)
from linvit.bench.peak import gemm_flops_per_second
from linvit.bench.plan import FULL_ATTENTION, Plan
from linvit.bench.presets import Group
from linvit.bench.results import Results
from linvit.bench.rows import Row, make_row
from linvit.bench.specs import build
from linvit.bench.timing import Runner, interleave, make_step


class Bench:
    """Measures the groups of a plan on a device, and adds what it finds to `results`."""

    def __init__(self, plan: Plan, results: Results, device: torch.device) -> None:
        self.plan = plan
        self.results = results
        self.device = device
        self._checked: set[tuple[str, str, tuple[int, int]]] = set()

    def measure(self, group: Group) -> list[Row]:
        """Rows of one group, also added to the results; those of an interrupted group are added too.

        Raises ValueError, naming the model, where one computes something else than it says, or fails.
        """
        self._check(group)
        # Anew before and after each group: a machine that others use does not keep its speed.
        self.results.gemm_flops_per_second[group.dtype] = self._peak(group)
        memory: dict[str, StepMemory] = {}
        runners = self._build(group)
        try:
            interleave(
                runners,
                rounds=group.rounds,
                warmup=group.warmup,
                clock=self._clock,
                report=lambda index: report(f"{group.title}: round {index + 1} of {group.rounds}"),
            )
            before = self.results.gemm_flops_per_second[group.dtype]
            self.results.gemm_flops_per_second[group.dtype] = max(before, self._peak(group))
            if self.device.type == "cuda":
                memory |= {r.model: cuda_step_memory(r.run) for r in runners if not r.is_out_of_memory}
            else:
                self._read_memory(group, memory)
        finally:
            rows = [self._row(runner, group, runners[0], memory) for runner in runners if _has_result(runner)]
            self.results.rows += rows
            del runners
            self._clean_up(group)
        return rows

    def _check(self, group: Group) -> None:
        """Check every model's attention, once for models that differ only in what they recompute."""
        for model in group.models:
            spec, facts = self.plan.specs[model], self.plan.facts[model, group.img_size]
            if facts.kind == FULL_ATTENTION:
                continue
            size = group.img_size if facts.patches <= MOST_PATCHES else size_to_check(spec, group.img_size)
            key = (spec.name, str(spec.kwargs), size)
            if key not in self._checked:
                report(f"{group.title}: checking {model}")
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

    def _read_memory(self, group: Group, memory: dict[str, StepMemory]) -> None:
        """Fill `memory` by processes of their own, for the models that the group names."""
        if group.memory and not can_read_peaks():
            self._note("memory of a step on a CPU is read from Linux's /proc, which is lacking here: left empty")
            return
        for model in group.memory:
            report(f"{group.title}: memory of {model}")
            try:
                memory[model] = step_memory_of_own_process(
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

    def _peak(self, group: Group) -> float:
        return gemm_flops_per_second(getattr(torch, group.dtype), self.device, clock=self._clock)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _note(self, text: str) -> None:
        if text not in self.results.notes:
            self.results.notes.append(text)
            report(text)

    def _clean_up(self, group: Group) -> None:
        """Leave the next group neither this one's models nor its compiled code."""
        gc.collect()
        if group.compile:
            torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _has_result(runner: Runner) -> bool:
    return bool(runner.seconds) or runner.is_out_of_memory


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Keep GPUs from computing float32 products in TF32, and put the setting back."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
