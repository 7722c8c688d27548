"""`linvit probe`: train a linear classifier on the features of a pretrained model."""

import shlex
from collections.abc import Sequence

from linvit.probe.options import ProbeOptions
from linvit.settings.flags import parse_options

SUMMARY = "train a linear classifier on a model's features, in one pass over the images"


def main(argv: Sequence[str]) -> int:
    """Train the classifier, and return the exit status."""
    options = parse_options(
        ProbeOptions,
        argv,
        prog="linvit probe",
        description="Train a linear classifier on the features of a pretrained model: features are computed once per "
        "image and kept, cross-validation on the training images chooses the L2 penalty, and the validation images "
        "only measure the result. RUN is then a run folder for eval, predict, explain and export.",
        positionals={"source": "SOURCE", "data_dir": "DATA"},
        spellings={
            "output": ["-o", "--output"],
            "json_file": ["--json"],
            "batch_size": ["-b", "--batch-size"],
            "workers": ["-j", "--workers"],
            "model": ["-m", "--model"],
        },
    )
    from linvit.probe.run import probe_command

    return probe_command(options, command=shlex.join(["linvit", "probe", *argv]))
