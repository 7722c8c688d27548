"""Write report.html at the end of training. It never fails a run that is done."""

from pathlib import Path

import torch

from linvit.data.sources.base import ImageSet
from linvit.output.files import reason, write_text
from linvit.output.terminal import note, print_line
from linvit.report.gather import RunData, gather
from linvit.report.page import render_runs
from linvit.report.run import read_run
from linvit.training.config import TrainConfig


def report_training(
    folder: Path, config: TrainConfig, train_set: ImageSet, val_set: ImageSet, *, device: torch.device
) -> None:
    """Write report.html into the folder of a run that is done; if that fails, print a warning and return."""
    try:
        run = read_run(folder)
        page = gather(run, RunData(config, train_set, val_set), device=device, evaluate=False)
        write_text(run.folder.report, render_runs([page]))
        print_line(f"report: {run.folder.report}")
    # The run is done and its weights are saved, whatever happens here.
    except KeyboardInterrupt:
        note(f"warning: no report was written (interrupted); `linvit report {folder}` tries again")
    except Exception as error:
        note(f"warning: no report was written ({reason(error)}); `linvit report {folder}` tries again")
