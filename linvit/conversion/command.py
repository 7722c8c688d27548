"""`linvit convert`."""

import shlex
from collections.abc import Sequence

from linvit.conversion.options import ConvertOptions
from linvit.settings.flags import parse_options

SUMMARY = "turn a pretrained Vision Transformer into a Linformer"


def main(argv: Sequence[str]) -> int:
    """Convert, and return the exit status."""
    options = parse_options(
        ConvertOptions,
        argv,
        prog="linvit convert",
        description="Turn a pretrained Vision Transformer into a Linformer, fitted to it on images without labels.",
        positionals={"source": "MODEL"},
        spellings={"json_file": ["--json"], "output": ["-o", "--output"], "batch_size": ["-b", "--batch-size"]},
    )
    from linvit.conversion.run import convert_command

    return convert_command(options, command=shlex.join(["linvit", "convert", *argv]))
