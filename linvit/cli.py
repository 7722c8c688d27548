"""The `linvit` command: reads the command line and calls one function per command, which loads what it needs."""

import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import linvit
from linvit.settings.fields import unknown
from linvit.settings.flags import UsageError, parse_options, run


class Command(NamedTuple):
    """A command's function, from its arguments to an exit status, and what it does in a few words."""

    function: Callable[[Sequence[str]], int]
    summary: str


def train(argv: Sequence[str]) -> int:
    from linvit.training.config import parse

    config = parse(argv, prog="linvit train")
    import train_imagenet

    return train_imagenet.train(config)


def evaluate(argv: Sequence[str]) -> int:
    from linvit.evaluation.options import EvalOptions

    options = parse_options(
        EvalOptions,
        argv,
        prog="linvit eval",
        description="Evaluate runs, checkpoints or timm models on images, and compare them.",
        positionals={"source": "SOURCE", "data_dir": "DATA"},
        spellings={
            "json_file": ["--json"],
            "csv_file": ["--csv"],
            "markdown_file": ["--markdown"],
            "plot_file": ["--plot"],
            "batch_size": ["-b", "--batch-size"],
            "workers": ["-j", "--workers"],
            "model": ["-m", "--model"],
        },
    )
    from linvit.evaluation.command import evaluate_command

    return evaluate_command(options)


def predict(argv: Sequence[str]) -> int:
    from linvit.prediction.options import PredictOptions

    options = parse_options(
        PredictOptions,
        argv,
        prog="linvit predict",
        description="Predict the classes of loose images, in folders or lists, whole or in tiles.",
        positionals={"source": "SOURCE", "images": "IMAGE"},
        spellings={
            "output": ["-o", "--output"],
            "batch_size": ["-b", "--batch-size"],
            "workers": ["-j", "--workers"],
            "model": ["-m", "--model"],
        },
    )
    from linvit.prediction.command import predict_command

    return predict_command(options)


def average(argv: Sequence[str]) -> int:
    from linvit.runs.average import AverageOptions

    options = parse_options(
        AverageOptions,
        argv,
        prog="linvit average",
        description="Average the weights of a run's checkpoints, or of several runs, into a folder that timm loads.",
        positionals={"sources": "SOURCE"},
        spellings={"output": ["-o", "--output"]},
    )
    from linvit.runs.average import average_command

    return average_command(options)


def lr_find(argv: Sequence[str]) -> int:
    from linvit.training.lr_find import parse_lr_find

    config = parse_lr_find(argv)
    from linvit.training.lr_find import lr_find_command

    return lr_find_command(config)


def data(argv: Sequence[str]) -> int:
    from linvit.data.demo import SetOptions, build_set

    return build_set(
        parse_options(
            SetOptions,
            argv,
            prog="linvit data",
            description="Build an image set as folders SPLIT/CLASS/IMAGE, from an installed package.",
            positionals={"name": "SET", "folder": "DIR"},
            spellings={"json_file": ["--json"]},
        )
    )


def check(argv: Sequence[str]) -> int:
    from linvit.check.options import CheckOptions

    options = parse_options(
        CheckOptions,
        argv,
        prog="linvit check",
        description="Find what is wrong with a folder of images, and say what training would do with it.",
        positionals={"data_dir": "DATA"},
        spellings={"json_file": ["--json"], "html_file": ["--html"], "workers": ["-j", "--workers"]},
    )
    from linvit.check.command import check_command

    return check_command(options)


def models(argv: Sequence[str]) -> int:
    from linvit.model.catalog import CatalogOptions, print_catalog

    return print_catalog(
        parse_options(
            CatalogOptions,
            argv,
            prog="linvit models",
            description="List the registered models.",
            positionals={"pattern": "PATTERN"},
            spellings={"json_file": ["--json"]},
        )
    )


def bench(argv: Sequence[str]) -> int:
    from linvit.bench.options import BenchOptions

    options = parse_options(
        BenchOptions,
        argv,
        prog="linvit bench",
        description="Time models side by side, and measure their memory.",
        positionals={},
        spellings={"json_file": ["--json"], "csv_file": ["--csv"], "plot_file": ["--plot"]},
    )
    from linvit.bench.command import bench_command

    return bench_command(options, command=shlex.join(["linvit", "bench", *argv]))


def spectrum(argv: Sequence[str]) -> int:
    from linvit.spectrum.options import SpectrumOptions

    options = parse_options(
        SpectrumOptions,
        argv,
        prog="linvit spectrum",
        description="Measure the ranks of a Vision Transformer's attention, and plan k per layer from them.",
        positionals={"source": "MODEL"},
        spellings={
            "json_file": ["--json"],
            "csv_file": ["--csv"],
            "plot_file": ["--plot"],
            "plan_file": ["--plan"],
        },
    )
    from linvit.spectrum.command import spectrum_command

    return spectrum_command(options, command=shlex.join(["linvit", "spectrum", *argv]))


def convert(argv: Sequence[str]) -> int:
    from linvit.conversion.options import ConvertOptions

    options = parse_options(
        ConvertOptions,
        argv,
        prog="linvit convert",
        description="Turn a pretrained Vision Transformer into a Linformer, fitted to it on images without labels.",
        positionals={"source": "MODEL"},
        spellings={"json_file": ["--json"], "output": ["-o", "--output"], "batch_size": ["-b", "--batch-size"]},
    )
    from linvit.conversion.command import convert_command

    return convert_command(options, command=shlex.join(["linvit", "convert", *argv]))


COMMANDS = {
    "train": Command(train, "train a model on folders of images (also: python train_imagenet.py)"),
    "eval": Command(evaluate, "evaluate a run, a checkpoint or a timm model"),
    "predict": Command(predict, "predict the classes of loose images"),
    "average": Command(average, "average the weights of checkpoints or runs"),
    "lr-find": Command(lr_find, "find a learning rate by raising it on throw-away weights"),
    "data": Command(data, "build an image set as folders, from an installed package"),
    "check": Command(check, "find what is wrong with a folder of images"),
    "models": Command(models, "list the registered models"),
    "bench": Command(bench, "time models side by side, and measure their memory"),
    "spectrum": Command(spectrum, "measure the ranks of attention, and plan k per layer"),
    "convert": Command(convert, "turn a pretrained Vision Transformer into a Linformer"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `linvit` with these arguments, by default the process's own, and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return run(lambda: _dispatch(arguments))


def _dispatch(argv: Sequence[str]) -> int:
    if not argv:
        raise UsageError(f"give a command: {', '.join(COMMANDS)} (linvit --help says more)")
    name, *rest = argv
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"linvit {linvit.__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(unknown("command", name, COMMANDS))
    return COMMANDS[name].function(rest)


def _usage() -> str:
    lines = ["usage: linvit COMMAND [arguments]", "", "Vision Transformers with Linformer attention.", "", "commands:"]
    lines += [f"  {name:<8} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "linvit COMMAND --help lists a command's options."])
