"""The command `linvit eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from linvit.evaluation.options import EvalOptions
    from linvit.evaluation.source import Evaluation

    # Writes the page of `--html`. Pages are above evaluation, so the caller passes this function.
    WritePage = Callable[[Sequence["Evaluation"], "EvalOptions", Path], None]

SUMMARY = "evaluate a run, a checkpoint or a timm model"


def main(argv: Sequence[str], *, write_page: WritePage) -> int:
    """Evaluate, and return the exit status."""
    from linvit.evaluation.options import EvalOptions
    from linvit.settings.flags import parse_options

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
            "html_file": ["--html"],
            "batch_size": ["-b", "--batch-size"],
            "workers": ["-j", "--workers"],
            "model": ["-m", "--model"],
        },
    )
    from linvit.distributed import record_errors

    return record_errors(evaluate_command)(options, write_page)


def evaluate_command(options: EvalOptions, write_page: WritePage | None = None) -> int:
    """Evaluate each source at each size, write files and print tables; returns the exit status.

    Raises UsageError for a file that cannot be written, and ValueError if sources, data or options do not fit together.
    """
    from linvit.data.sources.classes import is_class_order
    from linvit.data.sources.open import paths_of_split
    from linvit.distributed import joined_ranks
    from linvit.evaluation.source import evaluate_source
    from linvit.runs.folder import source_files
    from linvit.settings.fields import height_and_width
    from linvit.settings.flags import check_files, check_inputs

    sources = (options.source, *options.compare)
    # A fraction may be of DATA itself.
    images = [options.data_dir] if options.val_fraction else paths_of_split(options.data_dir, options.split)
    check_files(*options.files, inputs=[*images, *(file for each in sources for file in source_files(each))])
    if options.class_map is not None and not is_class_order(options.class_map):
        check_inputs(("--class-map", options.class_map))
    sizes: list[tuple[int, int] | None] = [height_and_width(size) for size in options.img_size]
    with joined_ranks(options.device) as ranks:
        evaluations = [evaluate_source(source, size, options, ranks) for source in sources for size in sizes or [None]]
        if ranks.is_primary:
            _report(evaluations, options, write_page)
    return 0


def _report(evaluations: list[Evaluation], options: EvalOptions, write_page: WritePage | None) -> None:
    from linvit.evaluation.report import add_comparisons, build_report
    from linvit.evaluation.scores import confusion, write_confusion
    from linvit.evaluation.show import show
    from linvit.evaluation.write import write_images, write_markdown, write_size_plot
    from linvit.output.files import write_json
    from linvit.output.terminal import page

    reports = [build_report(each, options) for each in evaluations]
    add_comparisons(reports, evaluations, options)
    if options.json_file is not None:
        # One result is written as an object, several as a list.
        write_json(options.json_file, reports if len(reports) > 1 else reports[0])
    if options.csv_file is not None:
        write_images(evaluations, options.csv_file)
    if options.markdown_file is not None:
        write_markdown(reports, options.markdown_file)
    if options.conformal_file is not None and evaluations[0].conformal is not None:
        write_json(options.conformal_file, evaluations[0].conformal[0].model_dump())
    if options.plot_file is not None:
        write_size_plot(reports, options.plot_file)
    if options.html_file is not None:
        assert write_page is not None, "--html needs the function that writes the page"
        write_page(evaluations, options, options.html_file)
    for path in options.confusion:
        collected = evaluations[0].collected
        write_confusion(confusion(collected.masked or collected.results, evaluations[0].match.class_names), path)
    show(page(outputs=(path for _, path in options.files)), reports)
