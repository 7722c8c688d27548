"""`linvit bench`."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from linvit.bench.options import BenchOptions, Group, select
from linvit.settings.flags import check_files, parse_options

if TYPE_CHECKING:
    from linvit.bench.plan import Plan, Row

SUMMARY = "time models side by side, and measure their memory"


def main(argv: Sequence[str]) -> int:
    """Measure, and return the exit status."""
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
    """Measure what the options ask for, show it and write the files; returns the exit status.

    `command` is recorded in the results. Raises UsageError for what cannot be built, before anything is timed, and
    ValueError where a model fails; what has been measured is written after every group, and when it is interrupted.
    """
    import torch

    from linvit.bench.output import show_models, show_rows
    from linvit.bench.plan import Plan
    from linvit.bench.run import Bench, Results, exact_float32
    from linvit.device import choose_device
    from linvit.output.terminal import page

    check_files(("--json", options.json_file), ("--csv", options.csv_file), ("--plot", options.plot_file))
    device = torch.device(choose_device(options.device))
    plan = Plan(select(options))
    results = Results(command)
    bench = Bench(plan, results, device)
    console = page()
    show_models(console, plan)
    with exact_float32():
        # Groups are added while the loop runs.
        for group in plan.groups:
            try:
                rows = bench.measure(group)
            finally:
                if results.rows:
                    results.write(options)
            show_rows(console, group.title, rows)
            _halve_where_memory_ran_out(plan, group, rows)
    return 0


def _halve_where_memory_ran_out(plan: "Plan", group: Group, rows: list["Row"]) -> None:
    if all(row.status == "ok" for row in rows):
        return
    from linvit.bench.run import report

    half = plan.halve(group)
    if half is not None:
        report(f"{group.title}: out of memory, so once more at batch {half.batch_size}")
