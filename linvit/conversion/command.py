"""`linvit convert`."""

import shlex
from collections.abc import Sequence

SUMMARY = "convert a pretrained Vision Transformer to a Linformer"


def main(argv: Sequence[str]) -> int:
    """Run `linvit convert` with these arguments and return its exit status."""
    from linvit.conversion.options import ConvertOptions
    from linvit.settings.flags import parse_options

    options = parse_options(
        ConvertOptions,
        argv,
        prog="linvit convert",
        description="Convert a pretrained Vision Transformer to a Linformer and fit it on unlabelled images.",
        positionals={"source": "MODEL"},
        spellings={"json_file": ["--json"], "output": ["-o", "--output"], "batch_size": ["-b", "--batch-size"]},
    )
    from linvit.conversion.run import convert_command

    return convert_command(options, command=shlex.join(["linvit", "convert", *argv]))
