"""`linvit spectrum`: the command line."""

import shlex
from collections.abc import Sequence

from linvit.settings.flags import parse_options
from linvit.spectrum.options import SpectrumOptions

SUMMARY = "measure the ranks of attention, and plan k per layer"


def main(argv: Sequence[str]) -> int:
    """Run `linvit spectrum` with these arguments and return the exit status."""
    options = parse_options(
        SpectrumOptions,
        argv,
        prog="linvit spectrum",
        description="Measure the ranks of a Vision Transformer's attention, and plan k per layer from them.",
        positionals={"source": "MODEL"},
        spellings={"json_file": ["--json"], "csv_file": ["--csv"], "plot_file": ["--plot"], "plan_file": ["--plan"]},
    )
    from linvit.spectrum.run import spectrum_command

    return spectrum_command(options, command=shlex.join(["linvit", "spectrum", *argv]))
