"""`linvit predict`: its options, and predictions on the images of a command line, printed or written to a file.

Heavy imports are inside functions to keep `--help` fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from linvit.evaluation.options import SourceOptions
from linvit.output.streams import goes_to_stdout, is_stream
from linvit.prediction.options import PredictorOptions
from linvit.prediction.writers import FORMATS, format_of
from linvit.settings.flags import UsageError, check_file, check_files, check_folder, check_inputs, parse_options

if TYPE_CHECKING:
    from linvit.data.sources.base import PackedStrings
    from linvit.data.sources.loose import LooseImages
    from linvit.prediction.heatmaps import HeatMaps
    from linvit.prediction.predictor import Prediction, Predictor
    from linvit.prediction.writers import Row, WriteRow
    from linvit.runs.folder import Classifier

SUMMARY = "predict the classes of loose images"


class PredictOptions(PredictorOptions, SourceOptions):
    """What to predict with, on which images, and how."""

    images: tuple[str, ...] = Field(
        description="images, folders (searched at any depth) or quoted globs; - reads paths from stdin, one per line"
    )
    label_type: Literal["name", "description"] = Field(
        "name", description="report class names, or their descriptions if the names are WordNet ids"
    )
    output: Path | None = Field(
        None,
        description=f"write the predictions to this file: {', '.join(FORMATS)}; - writes CSV to stdout; a name without "
        "an extension is a folder of parts, written by one process or all of torchrun's (default: lines on stdout, "
        "tab-separated in a pipe)",
    )
    part_format: Literal["csv", "jsonl", "parquet"] | None = Field(
        None, description="format of parts (default: that of the parts in the folder, else csv)"
    )
    part_size: int | None = Field(
        None,
        gt=0,
        description="images per part (default: that of the parts in the folder, else at most 1024 in full batches)",
    )

    tile_output: Path | None = Field(
        None, description="write the predictions of each tile to this file, or folder of parts if --output is one"
    )

    conformal: Path | None = Field(
        None,
        description="file of linvit eval --conformal-file: also report the set of classes that may be true, in the "
        "column `label_set`, and whether that is not exactly one, in `unsure`",
    )

    heatmap: Path | None = Field(
        None,
        description="write a heat map of each image to this folder, created if missing; its "
        "path is in the column `heatmap`",
    )
    heatmap_method: Literal["relevance", "gradcam", "cam", "rollout", "attention"] | None = Field(
        None, description="method of --heatmap, as in linvit explain (default: relevance; exported models: cam)"
    )

    @model_validator(mode="after")
    def _check(self) -> PredictOptions:
        for name, path in self.outputs:
            if path is not None and not _is_folder(path) and format_of(path) not in FORMATS:
                raise ValueError(
                    f"{name} {path}: the name must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, or have no "
                    "extension to be a folder of parts"
                )
        if self.tile_output is not None and _is_folder(self.tile_output) != self.in_parts:
            raise ValueError("--output and --tile-output must both be files, or both folders of parts")
        if not self.in_parts and (self.part_size is not None or self.part_format is not None):
            raise ValueError("--part-size and --part-format need --output FOLDER, a name without an extension")
        if self.in_parts and self.heatmap is not None:
            raise ValueError("--heatmap is not available with parts; give --output a file, or use linvit explain")
        if self.tile is None and self.tile_output is not None:
            raise ValueError("--tile-output needs --tile")
        if self.conformal is not None and self.tile is not None:
            raise ValueError("--conformal was calibrated on full images; remove --tile")
        if self.conformal is not None and self.label_type == "description":
            raise ValueError("--conformal goes by class names; remove --label-type description")
        if self.heatmap is None and "heatmap_method" in self.model_fields_set:
            raise ValueError("--heatmap-method needs --heatmap FOLDER")
        return self

    @property
    def in_parts(self) -> bool:
        """Whether the predictions go to a folder of parts."""
        return self.output is not None and _is_folder(self.output)

    @property
    def outputs(self) -> list[tuple[str, Path | None]]:
        """The files or folders of predictions, with their flags."""
        return [("--output", self.output), ("--tile-output", self.tile_output)]


def _is_folder(path: Path) -> bool:
    return not is_stream(path) and format_of(path) not in FORMATS and (not path.suffix or path.is_dir())


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
    if options.in_parts:
        from linvit.distributed import record_errors

        return record_errors(predict_parts_command)(options)
    return predict_command(options)


def predict_command(options: PredictOptions) -> int:
    """Write a prediction for every image, in order, to a file or stdout; returns the exit status.

    The status is 1 if none of the images can be read. Raises UsageError, before anything is loaded, for a path that
    does not exist and a file that cannot be written; ValueError if the source does not fit the options.
    """
    from linvit.data.sources.loose import LooseImages
    from linvit.device import choose_device
    from linvit.distributed import refuse_several_processes
    from linvit.output.terminal import note, print_line
    from linvit.prediction.writers import (
        HEATMAP_COLUMNS,
        IMAGE_COLUMNS,
        TILE_COLUMNS,
        open_rows,
        print_row,
        show_row,
        with_sets,
    )
    from linvit.runs.folder import source_files

    refuse_several_processes("give predict --output FOLDER, a name without an extension, to share the images in parts")
    check_inputs(("--class-map", options.class_map), ("--conformal", options.conformal))
    files = options.outputs
    check_files(*files, inputs=[*source_files(options.source), *_input_files(options.images)])
    show = note if any(goes_to_stdout(path) for _, path in files) else print_line
    images = LooseImages(_find_images(options, [path for _, path in files if path is not None]))
    if options.heatmap is not None:
        _check_heatmaps(options.heatmap, images)
    choose_device(options.device)
    classifier = _load(options, say=note)
    predictor = _create_predictor(classifier, options)
    heatmaps = None if options.heatmap is None else _create_heatmaps(options.heatmap, classifier, predictor, options)
    columns: tuple[str, ...] = IMAGE_COLUMNS if heatmaps is None else HEATMAP_COLUMNS
    if predictor.conformal is not None:
        columns = with_sets(columns)
    with ExitStack() as stack:
        is_shown = sys.stderr.isatty() if show is note else sys.stdout.isatty()
        write_image: WriteRow = (
            partial(show_row, show=show)
            if is_shown
            else partial(print_row, columns=columns, topk=predictor.topk, show=show)
        )
        write_tile: WriteRow = _discard
        if options.output is not None:
            write_image = stack.enter_context(open_rows(options.output, columns, topk=predictor.topk))
        if options.tile_output is not None:
            write_tile = stack.enter_context(open_rows(options.tile_output, TILE_COLUMNS, topk=predictor.topk))
        predictions = predictor.predict(images)
        if options.output is not None:
            predictions = _with_progress(predictions, len(images))
        num_unreadable = _write(predictions, write_image, write_tile, images=images, heatmaps=heatmaps)
    if options.output is not None:
        show(f"{options.output}: predictions on {len(images) - num_unreadable:,} of {len(images):,} images")
    if heatmaps is not None:
        # Without --output, lines on stdout are predictions.
        tell = note if options.output is None else show
        tell(f"{options.heatmap}: heat maps of {heatmaps.num_written:,} of {len(images):,} images")
    if num_unreadable:
        note(f"{num_unreadable:,} of {len(images):,} images have no prediction; their rows give the reasons")
    return 1 if len(images) and num_unreadable == len(images) else 0


def predict_parts_command(options: PredictOptions) -> int:
    """Write the predictions of every image to a folder of parts, with the processes of torchrun; returns the status.

    The status is 1 if none of the images can be read. Raises UsageError if images are missing or the folder has parts
    of another run, and ValueError if the source does not fit the options.
    """
    from linvit.prediction.share import predict_parts

    return predict_parts(
        [path for _, path in options.outputs if path is not None],
        device=options.device,
        find=partial(_find_images_for_parts, options),
        load=partial(_load_for_parts, options),
        write=_write,
        format=options.part_format,
        part_size=options.part_size,
    )


def _find_images_for_parts(options: PredictOptions) -> PackedStrings:
    """Check the folders, before anything is loaded, and list the images."""
    from linvit.prediction.parts import check_parts_folders

    check_inputs(("--class-map", options.class_map), ("--conformal", options.conformal))
    check_parts_folders(*options.outputs)
    return _find_images(options, [Path(f"{options.output}/part.{options.part_format or 'csv'}")])


def _load_for_parts(options: PredictOptions, device: str, say: Callable[[str], object]) -> tuple[Classifier, Predictor]:
    options = options.model_copy(update={"device": device})
    classifier = _load(options, say=say)
    return classifier, _create_predictor(classifier, options)


def _find_images(options: PredictOptions, outputs: Iterable[Path]) -> PackedStrings:
    """The paths of all images; raises UsageError if one is missing, or a package for the format of an output."""
    from linvit.data.sources.base import PackedStrings
    from linvit.prediction.writers import check_format

    try:
        for path in outputs:
            check_format(path)
        return PackedStrings.pack(_paths(options.images))
    except ValueError as error:
        raise UsageError(str(error)) from None


def _input_files(images: Iterable[str]) -> list[str]:
    """The files among the arguments, and that of the list on stdin; a folder holds no file that predictions replace."""
    return [file for file in ("/dev/stdin" if image == "-" else image for image in images) if os.path.isfile(file)]


def _paths(images: Iterable[str]) -> Iterator[str]:
    from linvit.data.sources.loose import expand, read_list

    for image in images:
        if image == "-":
            if sys.stdin is None:
                raise ValueError("- reads paths from stdin, which is closed; pipe a list into it")
            yield from read_list(sys.stdin.buffer)
        else:
            yield from expand(image, missing="refuse")


def _check_heatmaps(folder: Path, images: LooseImages) -> None:
    """Raise UsageError if the folder cannot be written, or if a map would replace an image."""
    from linvit.explanation.naming import check_maps

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--heatmap {folder} is not a folder; give a folder")
    check_folder("--heatmap", folder)
    check_maps("--heatmap", folder, map(images.path, range(len(images))), extensions=(".png",))
    if folder.exists():
        check_file("--heatmap", folder / "map.png")


def _load(options: PredictOptions, *, say: Callable[[str], object]) -> Classifier:
    from linvit.evaluation.inference import check_classifier, open_source

    classifier = open_source(options)
    check_classifier(classifier)
    return replace(classifier, class_names=_labels(classifier, options, say))


def _create_predictor(classifier: Classifier, options: PredictOptions) -> Predictor:
    from linvit.output.terminal import note
    from linvit.prediction.predictor import Predictor

    return Predictor(
        classifier,
        conformal=options.conformal,
        img_size=options.size,
        topk=options.topk,
        tile=options.tile,
        overlap=options.overlap,
        merge=options.merge,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        say=note,
    )


def _create_heatmaps(folder: Path, classifier: Classifier, predictor: Predictor, options: PredictOptions) -> HeatMaps:
    from linvit.prediction.heatmaps import HeatMaps
    from linvit.runtimes.model import is_exported

    method = options.heatmap_method or ("cam" if is_exported(options.source) else "relevance")
    # The predictor has moved the model to its device.
    heatmaps = HeatMaps(folder, method, classifier, img_size=predictor.spec.size, tiling=predictor.tiling)
    folder.mkdir(parents=True, exist_ok=True)
    return heatmaps


def _labels(classifier: Classifier, options: PredictOptions, say: Callable[[str], object]) -> list[str] | None:
    from linvit.evaluation.classes import lemmas

    names = classifier.class_names
    if names is None:
        say(f"{options.source} has no class names; predictions show class numbers; --class-map names them")
    if options.label_type == "name":
        return names
    descriptions = lemmas()
    if names is None or not descriptions.keys() >= set(names):
        raise ValueError(
            f"--label-type description: the classes of {options.source} are not WordNet ids; omit --label-type"
        )
    return [descriptions[name] for name in names]


def _write(
    predictions: Iterable[Prediction],
    write_image: WriteRow,
    write_tile: WriteRow,
    *,
    images: LooseImages | None = None,
    heatmaps: HeatMaps | None = None,
) -> int:
    """Write a row for every prediction and for each of its tiles; returns the number of images without a prediction."""
    from linvit.prediction.writers import IMAGE_COLUMNS

    num_unreadable = 0
    for index, prediction in enumerate(predictions):
        num_unreadable += prediction.error is not None
        heatmap = None
        if heatmaps is not None and images is not None:
            heatmap, prediction = heatmaps.write(images, index, prediction)
        row = {name: getattr(prediction, name) for name in IMAGE_COLUMNS}
        if prediction.label_set is not None:
            row |= {"label_set": "|".join(prediction.label_set), "unsure": "yes" if prediction.is_unsure else "no"}
        write_image({**row, "heatmap": heatmap})
        for tile in prediction.tiles:
            best = {"labels": tile.labels, "probabilities": tile.probabilities}
            write_tile({"path": prediction.path, **tile.box._asdict(), **best})
    return num_unreadable


def _discard(row: Row) -> None:
    pass


def _with_progress(predictions: Iterable[Prediction], num_images: int) -> Iterator[Prediction]:
    """The same predictions, with a progress bar if stderr is a terminal."""
    from linvit.output.terminal import progress_bar

    with progress_bar() as bar:
        yield from bar.track(predictions, total=num_images, description="predicting")
