"""Load a classifier, predict on the images of a command line, and print or write the predictions."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace

from linvit.data.sources.base import PackedStrings
from linvit.data.sources.loose import LooseImages, expand, read_list
from linvit.device import choose_device
from linvit.evaluation.classes import lemmas
from linvit.evaluation.inference import override_settings
from linvit.output.terminal import note, printable, progress_bar
from linvit.prediction.options import PredictOptions
from linvit.prediction.predictor import Prediction, Predictor
from linvit.prediction.writers import IMAGE_COLUMNS, TILE_COLUMNS, Row, WriteRow, check_format, open_rows
from linvit.runs.folder import Classifier, load_classifier
from linvit.settings.fields import height_and_width
from linvit.settings.flags import UsageError, check_files


def predict_command(options: PredictOptions) -> int:
    """Write a prediction for every image, in order, to a file or stdout; returns the exit status.

    The status is 1 if none of the images can be read. Raises UsageError, before anything is loaded, for a path that
    does not exist and a file that cannot be written; ValueError if the source does not fit the options.
    """
    check_files(("--output", options.output), ("--tile-output", options.tile_output))
    try:
        for path in (options.output, options.tile_output):
            if path is not None:
                check_format(path)
        images = LooseImages(PackedStrings.pack(_paths(options.images)))
    except ValueError as error:
        raise UsageError(str(error)) from None
    choose_device(options.device)
    predictor = _create_predictor(options)
    with ExitStack() as files:
        write_image: WriteRow = _print_row
        write_tile: WriteRow = _discard
        if options.output is not None:
            write_image = files.enter_context(open_rows(options.output, IMAGE_COLUMNS, topk=predictor.topk))
        if options.tile_output is not None:
            write_tile = files.enter_context(open_rows(options.tile_output, TILE_COLUMNS, topk=predictor.topk))
        predictions = predictor.predict(images)
        if options.output is not None:
            predictions = _with_progress(predictions, len(images))
        num_unreadable = _write(predictions, write_image, write_tile)
    if options.output is not None:
        print(f"{options.output}: predictions on {len(images) - num_unreadable:,} of {len(images):,} images")
    if num_unreadable:
        note(f"{num_unreadable:,} of {len(images):,} images cannot be read; their rows give the reasons")
    return 1 if len(images) and num_unreadable == len(images) else 0


def _paths(images: Iterable[str]) -> Iterator[str]:
    for image in images:
        if image == "-":
            yield from read_list(sys.stdin.buffer)
        else:
            yield from expand(image, missing="refuse")


def _create_predictor(options: PredictOptions) -> Predictor:
    size = None if options.img_size is None else height_and_width(options.img_size)
    classifier = load_classifier(
        options.source,
        weights=options.weights,
        img_size=size,
        model_name=options.model,
        model_kwargs=options.model_kwargs,
        use_ema=options.use_ema,
    )
    classifier = override_settings(classifier, options)
    return Predictor(
        replace(classifier, class_names=_labels(classifier, options)),
        img_size=size,
        topk=options.topk,
        tile=options.tile,
        overlap=options.overlap,
        merge=options.merge,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        say=note,
    )


def _labels(classifier: Classifier, options: PredictOptions) -> list[str] | None:
    names = classifier.class_names
    if names is None:
        note(f"{options.source} has no class names; predictions show class numbers")
    if options.label_type == "name":
        return names
    descriptions = lemmas()
    if names is None or not descriptions.keys() >= set(names):
        raise ValueError(
            f"--label-type description: the classes of {options.source} are not WordNet ids; omit --label-type"
        )
    return [descriptions[name] for name in names]


def _write(predictions: Iterable[Prediction], write_image: WriteRow, write_tile: WriteRow) -> int:
    """Write a row for every prediction and for each of its tiles; returns the number of unreadable images."""
    num_unreadable = 0
    for prediction in predictions:
        num_unreadable += prediction.error is not None
        write_image({name: getattr(prediction, name) for name in IMAGE_COLUMNS})
        for tile in prediction.tiles:
            best = {"labels": tile.labels, "probabilities": tile.probabilities}
            write_tile({"path": prediction.path, **tile.box._asdict(), **best})
    return num_unreadable


def _print_row(row: Row) -> None:
    best = (f"{label} {100 * probability:.1f} %" for label, probability in zip(row["labels"], row["probabilities"]))
    print(f"{printable(row['path'])}: {'; '.join(best) if row['error'] is None else row['error']}")


def _discard(row: Row) -> None:
    pass


def _with_progress(predictions: Iterable[Prediction], num_images: int) -> Iterator[Prediction]:
    """The same predictions, with a progress bar if stderr is a terminal."""
    with progress_bar() as bar:
        yield from bar.track(predictions, total=num_images, description="predicting")
