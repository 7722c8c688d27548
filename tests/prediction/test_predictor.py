"""Predictions equal those of evaluation, with or without tiles, from files or memory, at any batch size."""

import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import linvit
from linvit.data.decode import read_image
from linvit.data.loader import create_eval_loader
from linvit.data.sources.folder import open_folder
from linvit.evaluation.collect import evaluate
from linvit.evaluation.conformal import ConformalRule
from linvit.prediction.predictor import Predictor, default_batch_size
from linvit.runs.folder import Classifier, load_classifier

CPU = torch.device("cpu")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A lossless file of 70 × 90 pixels, larger than the run's 32 × 32."""
    pixels = np.random.default_rng(1).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    assert cv2.imwrite(str(tmp_path / "photo.png"), pixels)
    return tmp_path / "photo.png"


def by_label(prediction: Any) -> dict[str, float]:
    return dict(zip(prediction.labels, prediction.probabilities, strict=True))


def test_three_lines_give_a_prediction(run: Path, data: Path) -> None:
    predictor = linvit.Predictor(run)
    (prediction,) = predictor(data / "val/red/0.png")
    assert prediction.path == str(data / "val/red/0.png")
    assert sorted(prediction.labels) == ["blue", "green", "red"]
    assert sum(prediction.probabilities) == pytest.approx(1)
    assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_hits_and_probabilities_equal_those_of_evaluation(run: Path, data: Path, workers: int) -> None:
    predictor = Predictor(run, batch_size=4, workers=workers, device="cpu")
    classifier = load_classifier(str(run))
    dataset = open_folder(data, split="val", class_names=classifier.class_names)
    loader = create_eval_loader(dataset, predictor.spec, batch_size=4, workers=0, device="cpu")
    assert (predictor.spec.crop_pct, predictor.spec.interpolation, predictor.spec.std) == (0.7, "bilinear", (0.3,) * 3)
    predictions = list(predictor(dataset.paths))
    assert [prediction.path for prediction in predictions] == [str(path) for path in dataset.paths]
    hits: dict[str, list[bool]] = {name: [] for name in predictor.class_names}
    for prediction, path in zip(predictions, dataset.paths):
        hits[path.parent.name].append(prediction.labels[0] == path.parent.name)
    metrics = evaluate(classifier.model, loader, device=CPU)
    assert {name: 100 * sum(found) / len(found) for name, found in hits.items()} == metrics.per_class
    with torch.no_grad():
        probabilities = torch.cat([classifier.model(batch.images).softmax(1) for batch in loader]).tolist()
    for prediction, row in zip(predictions, probabilities, strict=True):
        found = by_label(prediction)
        # To the last bit of float32.
        assert np.array_equal(np.float32([found[name] for name in predictor.class_names]), np.float32(row))


@pytest.mark.parametrize("options", [{}, {"tile": 32}])
def test_a_generator_is_taken_batch_by_batch(options: dict[str, Any], run: Path, data: Path) -> None:
    image = cv2.imread(str(data / "val/red/0.png"))
    taken = []

    def camera() -> Iterator[np.ndarray]:
        for frame in count():
            taken.append(frame)
            yield image

    predictor = Predictor(run, batch_size=3, **options)
    predictions = predictor(camera())
    assert taken == []
    first = next(predictions)
    assert taken == [0, 1, 2]
    assert [next(predictions) for _ in range(4)] == [first] * 4
    assert taken == [0, 1, 2, 3, 4, 5]
    folder = data / "val/red"
    assert list(predictor(path for path in [folder, folder / "0.png"])) == list(predictor([folder, folder / "0.png"]))
    assert list(predictor(iter([]))) == list(predictor([])) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topk": 0}, "topk takes a whole number of at least 1, not 0"),
        ({"topk": True}, "topk takes a whole number"),
        ({"weights": "bset"}, "weights takes one of 'best', 'last', not 'bset' (did you mean 'best'?)"),
        ({"merge": "median", "tile": 32}, "merge takes one of 'mean', 'max'"),
        ({"img_size": 0}, "img_size takes a whole number greater than 0"),
        ({"img_size": (32, -1)}, "img_size takes"),
        ({"img_size": (32, 32, 3)}, "img_size takes"),
        ({"tile": 0}, "tile takes"),
        ({"tile": 32, "overlap": -1}, "overlap takes a whole number of at least 0"),
        ({"tile": 32, "overlap": 32}, "an overlap of 32 px does not fit tiles of 32×32 px"),
        ({"overlap": 4}, "overlap needs tile"),
        ({"batch_size": 0}, "batch_size takes a whole number greater than 0"),
        ({"workers": -1}, "workers takes a whole number of at least 0, not -1"),
        ({"workers": 1.5}, "workers takes"),
        ({"device": "cpuu"}, "cpuu: unknown device"),
        ({"amp": "yes"}, "amp takes True, False or None, not 'yes'"),
        ({"source": None}, "source takes a path, a model's name or a Classifier, not NoneType"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_loaded(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        Predictor(**{"source": "no/such/run", **options})
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_numbers(run: Path, photo: Path) -> None:
    own = Predictor(run, topk=2, img_size=(32, 32), tile=32)
    predictor = Predictor(run, topk=np.int64(2), img_size=(np.int32(32), np.int32(32)), tile=np.uint8(32))  # type: ignore[arg-type]
    assert list(predictor(photo)) == list(own(photo))


PIXELS = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (PIXELS.astype(np.float32), "an array of float32 (8, 8, 3) is not an image"),
        (PIXELS.astype(np.int64), "an array of int64 (8, 8, 3) is not an image"),
        (PIXELS[0, :, 0], "an array of uint8 (8,) is not an image"),
        (PIXELS[None], "an array of uint8 (1, 8, 8, 3) is not an image"),
        (PIXELS[:, :0], "an array of uint8 (8, 0, 3) is not an image"),
        ([torch.zeros(3, 8, 8)], "Tensor is not an image"),
        (None, "NoneType is not an image, nor a list of images"),
        (bytearray(b"a.jpg"), "int is not an image"),
        ([None], "NoneType is not an image"),
        ((each for each in [3]), "int is not an image"),
    ],
)
def test_what_is_not_an_image_is_named(images: Any, words: str, run: Path) -> None:
    predictor = Predictor(run)
    with pytest.raises(ValueError, match=re.escape(words)):
        list(predictor(images))


def test_a_path_that_cannot_exist_has_a_row(run: Path) -> None:
    nul, empty = Predictor(run)(["a\0.png", "x" * 300])
    assert nul.error == "is not a valid path (embedded null byte); correct or remove it"
    assert empty.error == "cannot be read (File name too long); restore or remove the file"


@pytest.mark.parametrize("options", [{}, {"tile": 32}, {"workers": 2}, {"tile": 32, "workers": 2}])
def test_an_unreadable_image_keeps_its_place(
    options: dict[str, Any], run: Path, photo: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:4000])
    red = data / "val/red/0.png"
    images = [tmp_path / "cut.png", photo, tmp_path / "no.png", red, tmp_path / "cut.png"]
    first, second, third, fourth, fifth = Predictor(run, batch_size=2, **options)(images)
    assert (first.labels, first.probabilities, first.path) == ((), (), str(tmp_path / "cut.png"))
    assert first.error == fifth.error == "is truncated, damaged or not an image; restore or remove the file"
    assert third.error == "cannot be read (No such file or directory); restore or remove the file"
    assert (second.path, second.error) == (str(photo), None)
    assert (fourth.path, fourth.error) == (str(red), None)
    assert len(fourth.labels) == 3


def test_arrays_and_pillow_images_are_predicted_like_their_file(run: Path, photo: Path) -> None:
    file, array, pillow = Predictor(run)([photo, read_image(photo), Image.open(photo)])
    assert (array.path, pillow.path) == (None, None)
    assert file.probabilities == array.probabilities == pillow.probabilities


def test_the_bytes_of_a_file_are_predicted_like_the_file(run: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for options in ({}, {"tile": 32}):
        predictor = Predictor(run, **options)
        from_file, failed = predictor([photo, tmp_path / "empty"])
        data, nothing = predictor([photo.read_bytes(), b""])
        assert data == replace(from_file, path=None)
        assert (nothing.path, nothing.error) == (None, failed.error)
    assert list(predictor(photo.read_bytes())) == [data]


def test_a_pickled_predictor_predicts_the_same_and_holds_no_weights(run: Path, photo: Path, tmp_path: Path) -> None:
    rule = ConformalRule(
        method="lac", alpha=0.1, threshold=0.7, num_calibration=9, class_names=Predictor(run).class_names
    )
    (tmp_path / "rule.json").write_text(rule.model_dump_json())
    options = {"topk": 2, "weights": "last", "img_size": (32, 40), "device": "cpu", "amp": True}
    for predictor in (
        Predictor(run, conformal=tmp_path / "rule.json", **options),
        Predictor(run, tile=32, merge="max"),
    ):
        pickled = pickle.dumps(predictor)
        assert len(pickled) < 2000
        again = pickle.loads(pickled)
        assert list(again(photo)) == list(predictor(photo))
        assert again.settings() == predictor.settings()
    # A classifier in memory travels as it is.
    classifier = load_classifier(str(run))
    assert list(pickle.loads(pickle.dumps(Predictor(classifier)))(photo)) == list(Predictor(run)(photo))


def test_sets_of_sure_images_are_those_of_double_precision(
    run: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Predictor(run).class_names
    rule = ConformalRule(method="lac", alpha=0.1, threshold=1e-9, num_calibration=9, class_names=names)
    (tmp_path / "rule.json").write_text(rule.model_dump_json())
    # The probability is 1 - 1.5e-8, which is one in single precision.
    logits = torch.tensor([[18.0] + [0.0] * (len(names) - 1)])
    monkeypatch.setattr(Predictor, "_logits", lambda predictor, images: logits)
    (found,) = Predictor(run, conformal=tmp_path / "rule.json")(photo)
    assert found.label_set == ()
    assert found.probabilities[0] == 1.0


def test_memory_that_runs_out_halves_the_batch(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = list(Predictor(run, batch_size=8)(data / "val"))
    classifier = load_classifier(str(run))
    forward = classifier.model.forward

    def crowded(images: torch.Tensor) -> Any:
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(images)

    monkeypatch.setattr(classifier.model, "forward", crowded)
    messages: list[str] = []
    found = list(Predictor(classifier, batch_size=8, say=messages.append)(data / "val"))
    assert [prediction.path for prediction in found] == [prediction.path for prediction in expected]
    for one, other in zip(found, expected):
        assert by_label(one) == pytest.approx(by_label(other), rel=1e-5)
    # One message per halving, not per batch.
    assert len(messages) == 2
    assert messages[-1] == "out of memory with 4 images at once; continuing with 2"


@pytest.mark.parametrize(("merge", "merged"), [("mean", np.mean), ("max", np.max)])
def test_tiles_of_the_models_size_are_seen_pixel_by_pixel(
    merge: Any, merged: Callable[..., np.ndarray], run: Path, photo: Path
) -> None:
    (prediction,) = Predictor(run, tile=32, overlap=8, merge=merge, batch_size=5)(photo)
    assert [tile.box[:2] for tile in prediction.tiles] == [
        (top, left) for top in (0, 24, 38) for left in (0, 24, 48, 58)
    ]
    # The same windows, predicted as images without a crop.
    classifier = load_classifier(str(run))
    uncropped = Classifier(
        classifier.model, classifier.class_names, classifier.weights, {**classifier.settings, "crop_pct": 1.0}
    )
    pixels = read_image(photo)
    windows = [pixels[top : top + 32, left : left + 32] for top, left, _, _ in (tile.box for tile in prediction.tiles)]
    alone = [by_label(part) for part in Predictor(uncropped, batch_size=5)(windows)]
    assert [by_label(tile) for tile in prediction.tiles] == alone
    table = np.array([[part[name] for name in prediction.labels] for part in alone])
    assert prediction.probabilities == pytest.approx(merged(table, axis=0), rel=1e-5)
    assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)


def test_larger_tiles_are_shrunk_without_a_crop(run: Path, photo: Path) -> None:
    (prediction,) = Predictor(run, tile=64, overlap=0)(photo)
    boxes = [tile.box for tile in prediction.tiles]
    assert [(box.height, box.width) for box in boxes] == [(64, 64)] * 4
    # Change a corner of a tile, which a centre crop would remove.
    pixels = read_image(photo).copy()
    pixels[:8, :8] = 255
    (changed,) = Predictor(run, tile=64, overlap=0)(pixels)
    assert changed.tiles[0].probabilities != prediction.tiles[0].probabilities
    assert changed.tiles[3] == prediction.tiles[3]


def test_an_image_no_larger_than_a_tile_is_treated_as_without_tiles(run: Path, data: Path) -> None:
    (plain,) = Predictor(run)(data / "val/red/0.png")
    (tiled,) = Predictor(run, tile=40, overlap=0)(data / "val/red/0.png")
    assert by_label(tiled) == by_label(plain)
    assert [tile.box for tile in tiled.tiles] == [(0, 0, 36, 40)]


def test_classes_without_names_go_by_number() -> None:
    model = timm.create_model("linvit_mini_patch4_64", num_classes=7)
    predictor = Predictor(Classifier(model.eval(), None, weights="", settings={}), topk=2)
    (prediction,) = predictor(np.zeros((64, 64, 3), np.uint8))
    assert len(prediction.labels) == 2
    assert set(prediction.labels) < set("0123456")


@pytest.mark.parametrize("tile", [None, 32])
def test_an_output_that_is_not_finite_is_an_error_of_its_image_alone(tile: int | None) -> None:
    model = timm.create_model("linvit_mini_patch4_64", num_classes=3).eval()
    dark, bright = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    # Images around zero after normalisation are finite, bright ones are not.
    model.register_forward_hook(lambda _, images, logits: logits / (images[0].mean((1, 2, 3)) < 0)[:, None])
    predictor = Predictor(Classifier(model, None, weights="", settings={}), tile=tile)
    first, wrong, last = predictor([dark, bright, dark])
    assert (wrong.error, wrong.labels, wrong.tiles) == ("the model's output for this image is NaN or infinite", (), ())
    assert first.error is last.error is None
    assert by_label(first) == by_label(last)


def test_precision_is_the_runs_by_default_in_python(run: Path, photo: Path) -> None:
    classifier = load_classifier(str(run))
    amp = Classifier(classifier.model, classifier.class_names, "", {**classifier.settings, "amp": True})
    (full,) = Predictor(run)(photo)
    (mixed,) = Predictor(amp)(photo)
    (off,) = Predictor(amp, amp=False)(photo)
    assert by_label(mixed) != by_label(full)
    assert off == full


def test_predicting_leaves_gradients_on(run: Path, photo: Path) -> None:
    for _ in Predictor(run)([photo, photo]):
        assert torch.is_grad_enabled()


def test_the_batch_is_smaller_for_larger_images() -> None:
    assert default_batch_size(CPU, (224, 224)) == 32
    assert default_batch_size(torch.device("cuda"), (224, 224)) == 256
    assert default_batch_size(torch.device("cuda:1"), (1024, 1024)) == 12
    assert default_batch_size(CPU, (2048, 2048)) == 1


def test_too_few_names_are_an_error() -> None:
    model: Any = nn.Identity()
    model.num_classes = 3
    with pytest.raises(ValueError, match=r"w.pt has 3 classes, but 2 names"):
        Predictor(Classifier(model, ["a", "b"], weights="w.pt", settings={}))
