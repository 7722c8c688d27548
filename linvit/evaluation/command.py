"""`linvit eval`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from linvit.evaluation.options import EvalOptions
from linvit.settings.fields import height_and_width
from linvit.settings.flags import check_files, parse_options

if TYPE_CHECKING:
    from linvit.evaluation.run import Evaluated

SUMMARY = "evaluate a run, a checkpoint or a timm model"


def main(argv: Sequence[str]) -> int:
    """Evaluate, and return the exit status."""
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
    from linvit.distributed import recorded

    return recorded(evaluate_command)(options)


def evaluate_command(options: EvalOptions) -> int:
    """`linvit eval`: evaluate each source at each size, show tables and write files; returns the exit status.

    Raises ValueError where sources, data or options do not fit together.
    """
    from linvit.distributed import joined_ranks
    from linvit.evaluation.run import evaluate_source

    check_files(*options.files)
    sizes: list[tuple[int, int] | None] = [height_and_width(size) for size in options.img_size]
    with joined_ranks(options.device) as ranks:
        evaluated = [
            evaluate_source(source, size, options, ranks)
            for source in (options.source, *options.compare)
            for size in sizes or [None]
        ]
        if ranks.is_primary:
            _report(evaluated, options)
    return 0


def _report(evaluated: list["Evaluated"], options: EvalOptions) -> None:
    from linvit.evaluation.confusion import confusion, write_confusion
    from linvit.evaluation.report import add_comparisons, report
    from linvit.evaluation.show import show, write_images, write_markdown, write_sweep
    from linvit.output.files import write_json

    reports = [report(each, options) for each in evaluated]
    add_comparisons(reports, evaluated, options)
    show(reports)
    if options.json_file is not None:
        # One result gives an object, several a list of them.
        write_json(options.json_file, reports if len(reports) > 1 else reports[0])
    if options.csv_file is not None:
        write_images(evaluated, options.csv_file)
    if options.markdown_file is not None:
        write_markdown(reports, options.markdown_file)
    if options.plot_file is not None:
        write_sweep(reports, options.plot_file)
    for path in options.confusion:
        collected = evaluated[0].collected
        write_confusion(confusion(collected.masked or collected.results, evaluated[0].match.class_names), path)
