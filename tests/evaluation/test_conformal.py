"""Conformal sets: against plain loops, their promised coverage, and through eval and predict."""

import csv
import json

import numpy as np
import pytest
import torch
from tiny_runs import make_images

import linvit
from linvit.cli import main
from linvit.data.augment.build import InputSpec
from linvit.evaluation.conformal import ConformalRule, assess, calibrate, scores
from linvit.evaluation.inference import input_spec
from linvit.model.build import create_model
from linvit.runs.folder import load_classifier, save_classifier

CLASSES = ["blue", "green", "red"]


def draw(generator, count, num_classes=8):
    """Probabilities of a model that is too sure of itself, and labels."""
    logits = torch.randn(count, num_classes, generator=generator)
    labels = logits.softmax(1).multinomial(1, generator=generator).squeeze(1)
    return (3 * logits).double().softmax(1), labels


def plain_score(probabilities, label, method):
    """Of one image, by the papers' equations."""
    if method == "lac":
        return 1 - probabilities[label]
    order = sorted(range(len(probabilities)), key=lambda each: -probabilities[each])
    rank = order.index(label) + 1
    return sum(probabilities[each] for each in order[:rank]) + 0.01 * max(0, rank - 5)


@pytest.mark.parametrize("method", ["lac", "raps"])
@pytest.mark.parametrize(("count", "alpha"), [(50, 0.1), (19, 0.05), (7, 0.4)])
def test_thresholds_and_sets_equal_plain_loops(method, count, alpha):
    generator = torch.Generator().manual_seed(count)
    probabilities, labels = draw(generator, count)
    rule = calibrate(probabilities, labels, alpha=alpha, method=method, class_names=list("abcdefgh"))
    rows, numbers = probabilities.tolist(), labels.tolist()
    ordered = sorted(plain_score(row, label, method) for row, label in zip(rows, numbers))
    # The smallest threshold that (n + 1)(1 - alpha) of the images, rounded up, lie within.
    within = next(index for index in range(1, count + 1) if index >= (count + 1) * (1 - alpha) - 1e-9)
    assert rule.threshold == pytest.approx(ordered[within - 1], abs=1e-12)
    found = rule.sets(probabilities)
    for row, kept in zip(rows, found.tolist()):
        expected = [plain_score(row, label, method) <= rule.threshold + 1e-12 for label in range(8)]
        if method == "raps":
            expected[row.index(max(row))] = True
        assert kept == expected


class NoRandomness(np.random.RandomState):
    """Makes MAPIE's adaptive scores those without the random share of the true class."""

    def uniform(self, *args, size=None, **kwargs):
        return np.zeros(size)


@pytest.mark.parametrize(("method", "num_classes"), [("lac", 8), ("raps", 5)])
@pytest.mark.parametrize(("count", "alpha"), [(200, 0.1), (57, 0.05), (19, 0.25)])
def test_thresholds_and_sets_equal_mapies(method, num_classes, count, alpha):
    """MAPIE's "aps" is `raps` without a penalty, and there is none on the first five ranks."""
    mapie = pytest.importorskip("mapie.classification", reason="needs pip install 'linvit[test]'")
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        """Takes probabilities as features, and returns them."""

        classes_ = np.arange(num_classes)

        def fit(self, x, y):
            return self

        def predict_proba(self, x):
            return x

        def predict(self, x):
            return x.argmax(1)

        def __sklearn_is_fitted__(self):
            return True

    generator = torch.Generator().manual_seed(count)
    (probabilities, labels), (others, other_labels) = (draw(generator, each, num_classes) for each in (count, 500))
    oracle = mapie.SplitConformalClassifier(
        Given(),
        confidence_level=1 - alpha,
        conformity_score={"lac": "lac", "raps": "aps"}[method],
        prefit=True,
        random_state=NoRandomness(),
    ).conformalize(probabilities.numpy(), labels.numpy())
    settings = {} if method == "lac" else {"conformity_score_params": {"include_last_label": False}}
    expected = torch.from_numpy(oracle.predict_set(others.numpy(), **settings)[1][:, :, 0])
    rule = calibrate(probabilities, labels, alpha=alpha, method=method, class_names=list("abcdefgh"[:num_classes]))
    found = rule.sets(others)
    assert rule.threshold == pytest.approx(oracle._mapie_classifier.quantiles_[0], abs=1e-12)
    assert torch.equal(found, expected)
    covered = expected.gather(1, other_labels[:, None]).squeeze(1)
    assert assess(rule, others, other_labels)["coverage"] == pytest.approx(100 * float(covered.double().mean()))


@pytest.mark.parametrize("method", ["lac", "raps"])
def test_coverage_is_what_was_promised(method):
    """1 - alpha at least, and for scores without ties at most 1 / (n + 1) more; the model's own confidence is wrong."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        probabilities, labels = draw(generator, 39 + 200)
        rule = calibrate(probabilities[:39], labels[:39], alpha=0.2, method=method, class_names=list("abcdefgh"))
        found.append(assess(rule, probabilities[39:], labels[39:])["coverage"])
    standard_error = np.std(found) / len(found) ** 0.5
    assert 80 - 4 * standard_error < np.mean(found)
    # Adaptive sets always hold the most probable class, and so cover more.
    assert np.mean(found) < (82.5 + 4 * standard_error if method == "lac" else 95)


def test_adaptive_sets_are_never_empty():
    rule = ConformalRule(method="raps", alpha=0.2, threshold=0.9, num_calibration=9, class_names=CLASSES)
    probabilities = torch.tensor([[0.999, 0.0005, 0.0005], [0.5, 0.3, 0.2]])
    assert rule.sets(probabilities).tolist() == [[True, False, False], [True, True, False]]


def test_assess_counts_by_hand():
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.34, 0.33, 0.33]])
    labels = torch.tensor([0, 2, 2])
    rule = calibrate(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([0]), alpha=0.5, method="lac", class_names=CLASSES)
    rule = rule.model_copy(update={"threshold": 0.69})
    found = assess(rule, probabilities, labels)
    assert found["mean_size"] == pytest.approx((1 + 1 + 3) / 3)
    assert found["coverage"] == pytest.approx(200 / 3)
    assert found["one_class"] == pytest.approx(200 / 3)
    assert (found["empty"], found["num_images"]) == (0, 3)
    assert found["coverage_per_class"] == {"blue": 100, "red": 50}


def test_too_few_images_are_refused():
    probabilities, labels = draw(torch.Generator().manual_seed(0), 8)
    with pytest.raises(ValueError, match="needs at least 9 images to calibrate on, not 8"):
        calibrate(probabilities, labels, alpha=0.1, method="lac", class_names=list("abcdefgh"))


def test_raps_penalises_ranks_beyond_the_fifth():
    even = torch.full((1, 8), 0.125)
    assert scores(even, "raps")[0, 7] - scores(even, "raps")[0, 4] == pytest.approx(3 * 0.125 + 3 * 0.01)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conformal")
    make_images(folder / "data", train=8, val=4)
    torch.manual_seed(0)
    model = create_model("linvit_mini_patch4_64", num_classes=3, img_size=(32, 32), embed_dim=32, depth=1, k=4).eval()
    with torch.no_grad():
        model.head.weight.mul_(200)
    spec = InputSpec((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    save_classifier(folder / "model", model, class_names=CLASSES, spec=spec, about={})
    return folder


def test_predict_gives_the_sets_that_eval_calibrated(source, tmp_path, capsys):
    rule, report, rows = tmp_path / "rule.json", tmp_path / "report.json", tmp_path / "rows.csv"
    model, data = str(source / "model"), str(source / "data")
    files = ["--conformal-file", str(rule), "--json", str(report), "-j", "0", "--device", "cpu"]
    assert main(["eval", model, data, "--conformal", "0.2", "--conformal-split", "train", *files]) == 0
    assert "hold the true class of" in capsys.readouterr().out
    found = json.loads(report.read_text())["conformal"]
    assert found["calibrated_on"] == "split train (24 images)"
    assert main(["predict", model, f"{data}/val", "--conformal", str(rule), "-o", str(rows), "-j", "0"]) == 0
    with rows.open(newline="") as file:
        predicted = list(csv.DictReader(file))
    assert list(predicted[0])[-3:] == ["label_set", "unsure", "error"]
    sets = [row["label_set"].split("|") if row["label_set"] else [] for row in predicted]
    assert np.mean([len(each) for each in sets]) == pytest.approx(found["mean_size"])
    names = [row["path"].split("/")[-2] for row in predicted]
    assert 100 * np.mean([name in each for name, each in zip(names, sets)]) == pytest.approx(found["coverage"])
    assert [row["unsure"] for row in predicted] == ["no" if len(each) == 1 else "yes" for each in sets]
    assert all(each == [row[f"label_{rank}"] for rank in range(1, len(each) + 1)] for row, each in zip(predicted, sets))
    (one,) = linvit.Predictor(model, conformal=rule, device="cpu")(predicted[0]["path"])
    assert (list(one.label_set), one.is_unsure) == (sets[0], len(sets[0]) != 1)


def test_a_rule_is_for_the_weights_size_and_preparation_that_it_was_calibrated_with(source, tmp_path, capsys):
    rule, model, data = str(tmp_path / "rule.json"), source / "model", str(source / "data")
    classifier = load_classifier(str(model))
    with torch.no_grad():
        classifier.model.head.bias += 1e-3
    spec = input_spec(classifier)
    save_classifier(tmp_path / "other", classifier.model, class_names=CLASSES, spec=spec, about={})
    common = ["-j", "0", "--device", "cpu"]
    calibrated = ["--conformal", "0.2", "--conformal-file", rule, "--crop-pct", "0.8"]
    assert main(["eval", str(model), data, *calibrated, *common]) == 0
    predict = [f"{data}/val/red", "--conformal", rule, *common]
    assert main(["predict", str(model), *predict, "--crop-pct", "0.8", "--interpolation", "bicubic"]) == 0
    capsys.readouterr()
    for arguments in (
        [str(tmp_path / "other"), *predict, "--crop-pct", "0.8"],
        [str(model), *predict],
        [str(model), *predict, "--crop-pct", "0.8", "--img-size", "48"],
    ):
        assert main(["predict", *arguments]) == 1
        error = capsys.readouterr().err
        assert "rule.json was calibrated for other weights, or for images of another size or preparation" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "MODEL", "DATA", "--conformal-split", "train"], "need --conformal"),
        (["eval", "MODEL", "DATA", "--conformal", "0.2", "--conformal-split", "val"], "is the split to evaluate"),
        (["eval", "MODEL", "DATA", "--conformal", "1"], "--conformal takes"),
        (
            ["eval", "MODEL", "DATA", "--conformal", "0.2", "--conformal-file", "r.json", "--img-size", "32", "48"],
            "at most one --img-size",
        ),
        (
            ["eval", "MODEL", "DATA", "--conformal", "0.2", "--conformal-file", "r.json", "--tta", "hflip"],
            "remove --tta",
        ),
        (["predict", "MODEL", "DATA", "--conformal", "OTHER", "-j", "0"], "other.json is not a rule of linvit eval"),
        (["predict", "MODEL", "DATA", "--conformal", "RULE", "--tile", "16"], "remove --tile"),
        (["predict", "MODEL", "DATA", "--conformal", "RULE", "-j", "0"], "a model with other classes"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, source, tmp_path, capsys):
    probabilities, labels = draw(torch.Generator().manual_seed(0), 8, 3)
    rule = calibrate(probabilities, labels, alpha=0.5, method="lac", class_names=["red", "blue", "green"])
    (tmp_path / "rule.json").write_text(rule.model_dump_json())
    places = {"MODEL": source / "model", "DATA": source / "data", "RULE": tmp_path / "rule.json"}
    places["OTHER"] = tmp_path / "other.json"
    places["OTHER"].write_text("{}")
    assert main([str(places.get(each, each)) for each in arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
