"""`linvit check`: its options and what it runs."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from linvit.check.faults import FAULTS
from linvit.data.options import InputRange
from linvit.settings.fields import unknown
from linvit.settings.flags import UsageError, check_files, parse_options

if TYPE_CHECKING:
    from linvit.check.listing import Listing
    from linvit.check.reader import Source

# Exit status if the images could not be checked.
NOT_CHECKED = 3
SUMMARY = "find problems in a folder of images"
# Width of the table in columns when stdout is a file or a pipe.
PAGE_WIDTH = 120


class CheckOptions(BaseModel):
    """Images to check, faults to allow, and output files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path = Field(
        description="folder of images: DATA/SPLIT/CLASS/IMAGE with any split names, DATA/CLASS/IMAGE, or DATA/IMAGE"
    )
    allow: tuple[str, ...] = Field((), description="faults to report as notes, which do not fail the check")
    near_duplicates: bool = Field(
        True, description="also look for files that show the same image, for example resized or recompressed"
    )
    max_pixels: int = Field(
        178_956_970,
        gt=0,
        description="report images with more pixels instead of decoding them (default: Pillow's limit, 179 million)",
    )
    input_range: InputRange | None = Field(
        None,
        title="two whole numbers LOW HIGH from 0 to 65535, such as 0 4095",
        description="values of 16-bit images that training will make black and white (default: 0 65535)",
    )
    workers: int | None = Field(
        None, ge=0, description="processes that read images; 0 uses the main process (default: one per usable core)"
    )
    json_file: Path | None = Field(None, description="write all findings to this JSON file")
    html_file: Path | None = Field(None, description="write an HTML report with thumbnails to this file")

    @field_validator("allow")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in FAULTS:
                raise ValueError(unknown("fault", name, FAULTS))
        return names


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    options = parse_options(
        CheckOptions,
        argv,
        prog="linvit check",
        description="Find problems in a folder of images, and report how training would handle them.",
        positionals={"data_dir": "DATA"},
        spellings={"json_file": ["--json"], "html_file": ["--html"], "workers": ["-j", "--workers"]},
    )
    try:
        return check_command(options)
    except (UsageError, BrokenPipeError):
        raise
    except (ValueError, OSError) as error:
        # 1 stands for faults.
        error.exit_status = NOT_CHECKED  # type: ignore[union-attr]
        raise


def check_command(options: CheckOptions) -> int:
    """Check the images, and write and print the report. Returns 1 if there are faults, otherwise 0.

    Raises UsageError for a file that cannot be written, and ValueError if there are no images.
    """
    from linvit.check.listing import open_source
    from linvit.check.report import show_report
    from linvit.output.files import write_json, write_text
    from linvit.output.terminal import page

    check_files(("--json", options.json_file), ("--html", options.html_file), inputs=[options.data_dir])
    listing, source = open_source(options.data_dir)
    report = check(options, listing, source)
    if options.json_file is not None:
        write_json(options.json_file, report)
    if options.html_file is not None:
        from linvit.check.page import render_page

        write_text(options.html_file, render_page(report, listing, source))
    show_report(page(PAGE_WIDTH, outputs=(options.json_file, options.html_file)), report)
    return 1 if report["num_faults"] else 0


def check(options: CheckOptions, listing: "Listing", source: "Source") -> dict[str, Any]:
    """Check the images of a listing; returns the report (see `build_report`)."""
    import numpy as np

    from linvit.check.duplicates import find_duplicates, find_near_duplicates, group_findings
    from linvit.check.pool import Pool, ProgressBar, usable_cores
    from linvit.check.reader import Reader, read_all
    from linvit.check.report import build_report, try_training
    from linvit.check.splits import check_classes, check_value_ranges, sample_for_colours, training_split

    workers = usable_cores() if options.workers is None else options.workers
    paths = [image.path for image in listing.images]
    started = time.perf_counter()
    train_split = training_split(listing)
    colour_sample = sample_for_colours(np.array([image.split == train_split for image in listing.images]))
    reader = Reader(source, max_pixels=options.max_pixels, input_range=options.input_range)
    with ProgressBar() as progress, Pool(workers, reader) as pool:
        measurements, findings = read_all(pool, paths, colour_sample, progress.stage("images", len(paths)).advance)
        if options.input_range is None:
            findings += check_value_ranges(measurements)
        duplicates = find_duplicates(measurements)
        findings += group_findings(duplicates, listing.images)
        near_duplicates = None
        if options.near_duplicates:
            near_duplicates = find_near_duplicates(measurements, duplicates, paths, pool, progress.stage)
            findings += group_findings(near_duplicates.groups, listing.images, prefix="near_")
    return build_report(
        options.data_dir,
        listing,
        measurements,
        [*listing.findings, *check_classes(listing), *findings],
        colour_sample=colour_sample,
        training_error=try_training(options.data_dir),
        near_duplicates=near_duplicates,
        allow=options.allow,
        seconds=time.perf_counter() - started,
        workers=workers,
    )
