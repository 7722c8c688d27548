"""`linvit bench`: the command, from its options to its files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from linvit.bench.options import BenchOptions, Group
    from linvit.bench.plan import Plan, Row

SUMMARY = "time models side by side, and measure their memory"


def main(argv: Sequence[str]) -> int:
    """Run `linvit bench` with these arguments and return the exit status."""
    from linvit.bench.options import BenchOptions
    from linvit.settings.flags import parse_options

    options = parse_options(
        BenchOptions,
        argv,
        prog="linvit bench",
        description="Time models side by side, and measure their memory.",
        positionals={},
        spellings={"json_file": ["--json"], "csv_file": ["--csv"], "plot_file": ["--plot"]},
    )
    return bench_command(options, command=shlex.join(["linvit", "bench", *argv]))


def bench_command(options: BenchOptions, *, command: str) -> int:
    """Measure the selected models, print tables and write the files; returns the exit status.

    `command` is recorded in the results. Files are written after every group, also when it is interrupted; pipes at the
    end. Raises UsageError, before anything is timed, if a model cannot be built, and ValueError if one fails.
    """
    import torch

    from linvit.bench.options import select
    from linvit.bench.output import show_models, show_rows
    from linvit.bench.plan import Plan
    from linvit.bench.run import Bench, Results
    from linvit.device import choose_device
    from linvit.measure.timing import exact_float32
    from linvit.output.terminal import page
    from linvit.settings.flags import check_files

    files = [("--json", options.json_file), ("--csv", options.csv_file), ("--plot", options.plot_file)]
    check_files(*files)
    device = torch.device(choose_device(options.device))
    plan = Plan(select(options))
    results = Results(command)
    bench = Bench(plan, results, device)
    console = page(outputs=(path for _, path in files))
    show_models(console, plan)
    try:
        with exact_float32():
            # The loop adds groups to the plan while it runs.
            for group in plan.groups:
                try:
                    rows = bench.measure(group)
                finally:
                    results.write(options, streams=False)
                show_rows(console, group.title, rows)
                _retry_smaller_batch(plan, group, rows)
    finally:
        results.write(options, streams=True)
    return 0


def _retry_smaller_batch(plan: Plan, group: Group, rows: list[Row]) -> None:
    """Plan the group again at half the batch size if a model ran out of memory."""
    if all(row.status == "ok" for row in rows):
        return
    from linvit.output.terminal import note

    half = plan.halve(group)
    if half is not None:
        note(f"{group.title}: out of memory; retrying at batch {half.batch_size}")
