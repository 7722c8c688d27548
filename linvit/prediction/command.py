"""The command `linvit predict`."""

from collections.abc import Sequence

from linvit.prediction.options import PredictOptions
from linvit.settings.flags import parse_options

SUMMARY = "predict the classes of loose images"


def main(argv: Sequence[str]) -> int:
    """Predict, and return the exit status."""
    options = parse_options(
        PredictOptions,
        argv,
        prog="linvit predict",
        description="Predict the classes of images, given as files, folders or lists, optionally in tiles.",
        positionals={"source": "SOURCE", "images": "IMAGE"},
        spellings={
            "output": ["-o", "--output"],
            "batch_size": ["-b", "--batch-size"],
            "workers": ["-j", "--workers"],
            "model": ["-m", "--model"],
        },
    )
    from linvit.prediction.run import predict_command

    return predict_command(options)
