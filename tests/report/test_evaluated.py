"""The evaluation half: classes, pairs, confusion matrix and bins against scikit-learn, SciPy and brute force."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from linvit.evaluation.metrics import ImageResults
from linvit.evaluation.predictions import Predictions
from linvit.report import evaluated
from linvit.report.evaluated import compare_predictions, evaluate_predictions, wilson, worst_rows
from linvit.report.examples import Worst
from linvit.report.page import Evaluated, render_evaluations


def predictions(num_classes: int = 7, num_images: int = 200, seed: int = 0) -> Predictions:
    """Predictions of which about half are right; the last class has no images."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes - 1, num_images)
    predicted = np.where(rng.random(num_images) < 0.5, labels, rng.integers(0, num_classes, num_images))
    results = ImageResults(
        indices=torch.arange(num_images),
        labels=torch.from_numpy(labels),
        losses=torch.from_numpy(rng.exponential(size=num_images)),
        predictions=torch.from_numpy(predicted),
        probabilities=torch.from_numpy(rng.random(num_images)),
        in_top5=torch.ones(num_images, dtype=torch.bool),
    )
    names = [f"class {number}" for number in range(num_classes)]
    return Predictions(results, names, [f"{number}.png" for number in range(num_images)])


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (0, 20), (7, 20), (20, 20), (500, 533)])
def test_intervals_of_shares_are_wilsons(hits: int, count: int) -> None:
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(hits, count) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)
    assert wilson(0, 0) == (0.0, 100.0)


def test_classes_and_pairs_are_those_of_scikit_learn() -> None:
    found = predictions()
    page = evaluate_predictions(found, num_resamples=20)
    labels, predicted = found.results.labels.numpy(), found.results.predictions.numpy()
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, labels=range(6))
    rows = {row["name"]: row for row in page["classes"]}
    assert list(rows) == sorted(rows, key=lambda name: (-rows[name]["errors"], name))
    for number in range(6):
        row = rows[f"class {number}"]
        values = [row["precision"], row["accuracy"], row["f1"], row["images"]]
        assert values == pytest.approx(
            [100 * precision[number], 100 * recall[number], 100 * f1[number], support[number]]
        )
    matrix = confusion_matrix(labels, predicted, labels=range(7))[:6]
    errors = matrix.copy()
    np.fill_diagonal(errors, 0)
    first = page["pairs"][0]
    assert first["images"] == errors.max()
    assert errors[int(first["label"][-1]), int(first["prediction"][-1])] == errors.max()
    assert all(rows[f"class {number}"]["taken_count"] == errors[number].max() for number in range(6))
    # The class without images has no row, but a column.
    assert page["confusion"]["names"] == found.class_names[:6]
    assert np.array_equal(page["confusion"]["counts"], matrix)
    assert all(sorted(order) == list(range(6)) for order in page["confusion"]["orders"].values())
    # The bins give the calibration error.
    gaps = [each["share"] * abs(each["confidence"] - each["accuracy"]) for each in page["bins"]]
    assert sum(gaps) == pytest.approx(page["ece"])
    assert sum(each["images"] for each in page["bins"]) == 200


def test_many_classes_are_cut_to_those_with_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluated, "MOST_CELLS", 3)
    found = predictions()
    page = evaluate_predictions(found, num_resamples=0)
    matrix = page["confusion"]
    assert matrix["columns"] == [*matrix["names"], "classes not shown"]
    assert np.array_equal(np.sum(matrix["counts"], axis=1), matrix["totals"])
    assert (len(matrix["names"]), matrix["num_classes"]) == (3, 6)
    assert page["scores"][0]["interval"] is None


def test_evaluations_on_a_page_share_the_room_for_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linvit.report.page.MOST_CLASSES", 8)
    monkeypatch.setattr("linvit.report.page.FEWEST_CLASSES", 3)
    for count, shown in ((1, 6), (2, 4), (4, 3)):
        each = Evaluated("model", "subject", predictions(), Worst([], None))
        page = render_evaluations([each] * count, title="title", facts=[])
        tables = page.split('aria-label="Classes of model"')[1:]
        assert [table.split("</tbody>")[0].count("<tr><th scope") for table in tables] == [shown] * count
        assert page.count(f"The {shown} of 6 classes with the most errors.") == (0 if count == 1 else count)
        # All classes are side by side.
        sides = page.split('aria-label="Classes side by side"')[1:]
        assert [side.split("</tbody>")[0].count("<tr><th scope") for side in sides] == [6] * (count > 1)


def test_confused_classes_are_neighbours() -> None:
    found = predictions(num_classes=5, num_images=400)
    labels = torch.arange(400) % 4
    # Classes 0 and 3 are taken for each other half of the time, as are 1 and 2.
    swapped = torch.where(torch.arange(400) % 8 < 4, labels, 3 - labels)
    results = found.results.__class__(
        **{**found.results.__dict__, "labels": labels, "predictions": swapped}  # type: ignore[arg-type]
    )
    order = evaluate_predictions(Predictions(results, found.class_names, found.paths), num_resamples=0)["confusion"][
        "orders"
    ]["confused classes together"]
    place = [order.index(number) for number in range(4)]
    assert abs(place[0] - place[3]) == abs(place[1] - place[2]) == 1


def test_a_single_class_and_a_single_image() -> None:
    results = predictions(num_classes=2, num_images=1).results
    page = evaluate_predictions(Predictions(results, ["a", "b"], ["x"]), num_resamples=5)
    assert [row["images"] for row in page["classes"]] == [1]
    assert page["confusion"]["orders"]["confused classes together"] == [0]


def test_all_images_right_is_no_certainty() -> None:
    found = predictions()
    perfect = found.results.__class__(**{**found.results.__dict__, "predictions": found.results.labels})
    page = evaluate_predictions(Predictions(perfect, found.class_names, found.paths), num_resamples=20)
    scores = {score["id"]: score for score in page["scores"]}
    assert scores["top1"]["interval"] == scores["top5"]["interval"] == wilson(200, 200)
    assert scores["macro_f1"]["interval"] is None
    low, high = scores["ece"]["interval"]
    assert low < high
    assert (page["pairs"], page["num_errors"]) == ([], 0)


def test_runs_are_compared_on_the_same_images_only() -> None:
    found, other = predictions(), predictions(seed=1)
    same = Predictions(
        other.results.__class__(**{**other.results.__dict__, "labels": found.results.labels}), *names(found)
    )
    against = compare_predictions(same, found)
    assert against is not None
    hits = same.results.correct.double().mean() - found.results.correct.double().mean()
    assert against["top1_difference"] == pytest.approx(100 * float(hits))
    assert compare_predictions(other, found) is None
    assert compare_predictions(Predictions(found.results, found.class_names, [*found.paths[1:], "new"]), found) is None


def names(found: Predictions) -> tuple[list[str], list[str]]:
    return found.class_names, found.paths


def test_the_worst_images_have_the_highest_loss() -> None:
    results = predictions().results
    assert worst_rows(results, most=3) == results.losses.argsort(descending=True)[:3].tolist()
