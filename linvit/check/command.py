"""`linvit check`."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from linvit.check.options import CheckOptions
from linvit.settings.flags import check_files, parse_options

if TYPE_CHECKING:
    from linvit.check.listing import Listing
    from linvit.check.run import Source

SUMMARY = "find what is wrong with a folder of images"
# Columns of the table where stdout is a file or a pipe.
PAGE_WIDTH = 120


def main(argv: Sequence[str]) -> int:
    """Check, and return the exit status."""
    options = parse_options(
        CheckOptions,
        argv,
        prog="linvit check",
        description="Find what is wrong with a folder of images, and say what training would do with it.",
        positionals={"data_dir": "DATA"},
        spellings={"json_file": ["--json"], "html_file": ["--html"], "workers": ["-j", "--workers"]},
    )
    return check_command(options)


def check_command(options: CheckOptions) -> int:
    """Check the images, show and write what was found; the exit status is 1 where there are faults.

    Raises ValueError where there are no images.
    """
    from linvit.check.listing import open_source
    from linvit.check.page import render_page
    from linvit.check.report import show_report
    from linvit.output.files import write_json, write_text
    from linvit.output.terminal import page

    check_files(("--json", options.json_file), ("--html", options.html_file))
    listing, source = open_source(options.data_dir)
    report = check(options, listing, source)
    show_report(page(PAGE_WIDTH), report)
    if options.json_file is not None:
        write_json(options.json_file, report)
    if options.html_file is not None:
        write_text(options.html_file, render_page(report, listing, source))
    return 1 if report["num_faults"] else 0


def check(options: CheckOptions, listing: "Listing", source: "Source") -> dict[str, Any]:
    """The report on a listing; see `build_report`."""
    import numpy as np

    from linvit.check.classes import check_classes, drawn_for_colours, training_split
    from linvit.check.duplicates import find_copies, find_near_copies, name_groups
    from linvit.check.report import build_report, try_training
    from linvit.check.run import Pool, ProgressBar, Reader, read_all, usable_cores

    workers = usable_cores() if options.workers is None else options.workers
    paths = [image.path for image in listing.images]
    started = time.perf_counter()
    trained_on = training_split(listing)
    coloured = drawn_for_colours(np.array([image.split == trained_on for image in listing.images]))
    with ProgressBar() as progress, Pool(workers, Reader(source, max_pixels=options.max_pixels)) as pool:
        measurements, findings = read_all(pool, paths, coloured, progress.stage("images", len(paths)).advance)
        copies = find_copies(measurements)
        findings += name_groups(copies, listing.images)
        near = None
        if options.near_duplicates:
            near = find_near_copies(measurements, copies, paths, pool, progress.stage)
            findings += name_groups(near.groups, listing.images, prefix="near_")
    return build_report(
        options.data_dir,
        listing,
        measurements,
        [*listing.findings, *check_classes(listing), *findings],
        coloured=coloured,
        training=try_training(options.data_dir),
        near_copies=near,
        allow=options.allow,
        seconds=time.perf_counter() - started,
        workers=workers,
    )
