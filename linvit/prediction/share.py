"""Predictions that several processes share: `linvit predict` with a folder of parts, under torchrun or alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch

from linvit.data.sources.base import PackedStrings
from linvit.data.sources.loose import LooseImages
from linvit.distributed import joined_ranks, on_primary, sum_over_ranks, waiting_group
from linvit.output.terminal import note, print_line, progress_bar
from linvit.prediction.identity import identify
from linvit.prediction.parts import Format, Parts, default_part_size, open_parts
from linvit.prediction.predictor import Prediction, Predictor
from linvit.prediction.writers import IMAGE_COLUMNS, TILE_COLUMNS, Row, WriteRow, open_rows, with_sets
from linvit.runs.folder import Classifier

Say = Callable[[str], object]


def predict_parts(
    folders: Sequence[Path],
    *,
    device: str,
    find: Callable[[], PackedStrings],
    load: Callable[[str, Say], tuple[Classifier, Predictor]],
    write: Callable[[Iterable[Prediction], WriteRow, WriteRow], int],
    format: Format | None,
    part_size: int | None,
) -> int:
    """Write the parts that are missing, each by one process; returns the exit status, 1 if no image can be read.

    Processes exchange nothing while they predict.

    Args:
        folders: the folder of the images' predictions, and that of the tiles' if they are written.
        device: as for `joined_ranks`.
        find: lists the paths of all images; the primary process calls it.
        load: loads the model on a device, with a function for messages.
        write: writes the rows of images and of their tiles; returns the number of images without a prediction.
        format, part_size: as for `open_parts`.

    Raises UsageError if the parts belong to another run, ValueError if parts are missing at the end, and what `find`,
    `load` and `write` raise.
    """
    with joined_ranks(device) as ranks, ExitStack() as stack:
        group = waiting_group()
        paths = on_primary(find, group)
        alone = ranks.world_size == 1
        classifier, predictor = load(device if alone else str(ranks.device), note if ranks.is_primary else _discard)
        identity = identify(paths, classifier, predictor)
        size = default_part_size(
            len(paths),
            world_size=ranks.world_size,
            # Tiled images are predicted one by one.
            batch_size=predictor.batch_size if predictor.tiling is None else 1,
        )
        opened = open_parts(folders, identity, format=format, part_size=part_size, default_size=size)
        parts = on_primary(lambda: stack.enter_context(opened), group)
        if parts.identity != identity:
            raise ValueError(f"{classifier.weights} changed while the processes loaded it; run the command again")

        own = parts.share(ranks.rank, ranks.world_size)
        images = LooseImages(PackedStrings.pack(paths[index] for part in own for index in parts.images(part)))
        with progress_bar(is_shown=ranks.is_primary) as bar:
            # One loader for all parts, so that its workers read ahead across parts.
            predictions = iter(bar.track(predictor.predict(images), total=len(images), description="predicting"))
            num_unreadable = sum(_write_part(parts, part, predictions, predictor, write) for part in own)
        num_unreadable = int(sum_over_ranks(torch.tensor(num_unreadable), group))
        return on_primary(lambda: _finish(parts, num_unreadable), group)


def _write_part(
    parts: Parts,
    part: int,
    predictions: Iterator[Prediction],
    predictor: Predictor,
    write: Callable[[Iterable[Prediction], WriteRow, WriteRow], int],
) -> int:
    """Write the files of a part from the next predictions; returns the number of images without one."""
    image_columns = IMAGE_COLUMNS if predictor.conformal is None else with_sets(IMAGE_COLUMNS)
    with ExitStack() as files:
        writers = [
            files.enter_context(open_rows(file, columns, topk=predictor.topk, json_lines="complete"))
            for file, columns in zip(parts.files(part), (image_columns, TILE_COLUMNS))
        ]
        write_image, write_tile = (*writers, _discard)[:2]
        counted = _Counted(islice(predictions, len(parts.images(part))))
        num_unreadable = write(counted, write_image, write_tile)
        if counted.number != len(parts.images(part)):
            raise RuntimeError(f"part {part} has {counted.number} rows for {len(parts.images(part))} images")
        return num_unreadable


class _Counted(Iterator[Prediction]):
    """Predictions, and how many there were: a missing one would shift the rows of all later parts."""

    def __init__(self, predictions: Iterator[Prediction]) -> None:
        self._predictions, self.number = predictions, 0

    def __next__(self) -> Prediction:
        prediction = next(self._predictions)
        self.number += 1
        return prediction


def _finish(parts: Parts, num_unreadable: int) -> int:
    """Complete the manifests, report and return the exit status; raises ValueError if a part is missing."""
    absent = parts.absent(parts.missing)
    if absent:
        raise ValueError(
            f"{parts.files(absent[0])[0]} is missing, although it was written: all machines must see the same "
            f"{parts.folders[0]}; choose a folder that they share"
        )
    parts.write_manifests(is_complete=True)
    num_images = sum(len(parts.images(part)) for part in parts.missing)
    num_before = len(parts) - len(parts.missing)
    before = f"; already complete: {num_before:,} of {len(parts):,} parts" if num_before else ""
    print_line(f"{parts.folders[0]}: predictions on {num_images - num_unreadable:,} of {num_images:,} images{before}")
    if num_unreadable:
        note(f"{num_unreadable:,} of {num_images:,} images have no prediction; their rows give the reasons")
    return 1 if num_images and num_unreadable == num_images and not num_before else 0


def _discard(row: Row | str) -> None:
    pass
