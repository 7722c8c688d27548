"""`linvit report`: the page of one run, or of several side by side.

Heavy imports are inside functions to keep `--help` fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linvit.settings.flags import check_files, parse_options

if TYPE_CHECKING:
    from linvit.report.run import Run

SUMMARY = "write an HTML page about one or several runs"


class ReportOptions(BaseModel):
    """Runs to report on, and the file to write."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: tuple[Path, ...] = Field(min_length=1, description="one or more run folders; several are shown side by side")
    output: Path | None = Field(
        None, description="HTML file to write (default, for one run: report.html in its folder)"
    )
    data_dir: Path | None = Field(
        None,
        description="folder that contains the runs' images now (default: the recorded one); the best weights of runs "
        "without predictions.csv are evaluated on it",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto uses a GPU if there is one")

    @model_validator(mode="after")
    def _check(self) -> ReportOptions:
        if self.output is None and len(self.runs) > 1:
            raise ValueError("several runs need a file to write to: -o FILE")
        return self


def main(argv: Sequence[str]) -> int:
    """Write the page, and return the exit status."""
    options = parse_options(
        ReportOptions,
        argv,
        prog="linvit report",
        description="Write a self-contained HTML page about one or several runs: scores with intervals, curves, "
        "confusion matrix, classes, worst images with heat maps, calibration, augmented images, settings and cost.",
        positionals={"runs": "RUN"},
        spellings={"output": ["-o", "--output"], "data_dir": ["--data"]},
    )
    return report_command(options)


def _with_own_names(runs: Sequence[Run]) -> list[Run]:
    """The runs; those that share the name of their folder are called by its path."""
    from collections import Counter
    from dataclasses import replace

    count = Counter(run.name for run in runs)
    return [replace(run, name=str(run.folder.path)) if count[run.name] > 1 else run for run in runs]


def report_command(options: ReportOptions) -> int:
    """Write the page of the runs; returns the exit status.

    Raises UsageError for a page that cannot be written, and ValueError for folders that are not of a run.
    """
    import torch

    from linvit.device import choose_device
    from linvit.output.files import write_text
    from linvit.output.terminal import print_line
    from linvit.report.gather import gather, open_data
    from linvit.report.page import render_runs
    from linvit.report.run import read_run
    from linvit.runs.folder import source_files

    runs = _with_own_names([read_run(path) for path in options.runs])
    output = options.output or runs[0].folder.report
    check_files(("--output", output), inputs=[file for path in options.runs for file in source_files(str(path))])
    device = torch.device(choose_device(options.device))
    pages = []
    for run in runs:
        data = open_data(run, options.data_dir)
        pages.append(gather(run, data, device=device, evaluate=options.data_dir is not None, num_runs=len(runs)))
    write_text(output, render_runs(pages))
    print_line(f"report: {output}")
    return 0
