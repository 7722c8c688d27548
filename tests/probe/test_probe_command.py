"""`linvit probe`: the run that it writes, the features that it keeps, and what it refuses."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from tiny_runs import SETTINGS, make_images

from linvit import cli
from linvit.probe import head
from linvit.runs.folder import load_classifier


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a classifier, as `linvit convert` writes it."""
    folder = tmp_path_factory.mktemp("source") / "model"
    torch.manual_seed(0)
    model = timm.create_model(
        SETTINGS["model"], **SETTINGS["model_kwargs"], k=4, img_size=32, num_classes=0, global_pool="avg"
    )
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def _few_penalties() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "PENALTIES", (1e-1, 1e-2))
        yield


def probe(source: object, data: Path, output: Path, *flags: str) -> int:
    return cli.main(["probe", str(source), str(data), "-o", str(output), "-j", "0", "--device", "cpu", *flags])


@pytest.fixture(scope="module")
def run(source: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    assert probe(source, data, output, "--json", str(output.parent / "probe.json"), "-b", "5") == 0
    return output


def test_the_run_is_evaluated_predicted_and_explained(run: Path, data: Path, tmp_path: Path) -> None:
    found = json.loads((run.parent / "probe.json").read_text())
    assert (found["num_train"], found["num_images"], found["num_classes"]) == (24, 9, 3)
    assert found["top1"] == 100, "a channel's mean tells these classes apart"
    assert cli.main(["eval", str(run), str(data), "-j", "0", "--json", str(tmp_path / "eval.json")]) == 0
    measured = json.loads((tmp_path / "eval.json").read_text())
    for name in ("top1", "top5", "macro_f1"):
        assert measured[name] == found[name]
        assert measured["confidence"][name] == found["confidence"][name]
    assert measured["loss"] == pytest.approx(found["loss"], rel=1e-4)
    image = str(data / "val/green/0.png")
    assert cli.main(["predict", str(run), image, "-o", str(tmp_path / "predictions.csv"), "-j", "0"]) == 0
    assert ",green," in (tmp_path / "predictions.csv").read_text()
    assert cli.main(["explain", str(run), image, "-o", str(tmp_path / "maps"), "--page-size", "0"]) == 0
    assert cli.main(["report", str(run), "-o", str(tmp_path / "report.html")]) == 0
    report = (tmp_path / "report.html").read_text()
    assert "linear probe of " in report
    assert "logistic regression on features of the images, seed 0" in report
    assert sorted(path.name for path in run.iterdir()) == [
        *("README.md", "args.yaml", "best", "last", "predictions.csv", "summary.csv"),
    ]


def test_only_the_classifier_is_new(run: Path, source: Path) -> None:
    before, after = (load_classifier(str(folder)).model.state_dict() for folder in (source, run))
    assert after.keys() - before.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_later_probes_reuse_the_features(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A probe of a probe: the classifier is not part of the features, nor is the batch.
    again = run.parent / "again"
    assert probe(run, data, again, "-b", "3", "--seed", "0") == 0
    out = capsys.readouterr().out
    assert "24 training images at 32 px, 32 features each: reused, in" in out
    assert "9 validation images at 32 px, 32 features each: reused, in" in out
    assert (again / "best/model.safetensors").read_bytes() == (run / "best/model.safetensors").read_bytes()
    # Mirror images are further training rows.
    assert probe(run, data, run.parent / "flipped", "--flip", "--features-dir", str(run.parent / "features")) == 0
    assert "9 validation images at 32 px, 32 features each: reused, in" in capsys.readouterr().out
    weights = [load_classifier(str(run.parent / name)).model.head.weight for name in ("again", "flipped")]
    assert not torch.equal(*weights)


def test_validation_images_choose_nothing(run: Path, source: Path, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    (copy / "val/red").rename(copy / "val/swap")
    (copy / "val/blue").rename(copy / "val/red")
    (copy / "val/swap").rename(copy / "val/blue")
    assert probe(source, copy, tmp_path / "run") == 0
    first, second = (folder / "best/model.safetensors" for folder in (run, tmp_path / "run"))
    assert first.read_bytes() == second.read_bytes()


def test_unreadable_images_are_left_out(
    source: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    for name in ("train/red/3.png", "val/blue/1.png"):
        (copy / name).write_bytes(b"")
    assert probe(source, copy, tmp_path / "run") == 1
    assert "train/red/3.png" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [copy]
    assert probe(source, copy, tmp_path / "run", "--on-bad-image", "skip") == 0
    out = capsys.readouterr().out
    assert "23 training images (1 cannot be read)" in out
    assert "8 validation images (1 cannot be read)" in out


def test_a_model_of_timm_and_images_without_a_validation_split(data: Path, tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=5)
    timm.models.save_for_hf(model, tmp_path / "source", safe_serialization=True)
    assert (
        probe(tmp_path / "source", data / "train", tmp_path / "run", "--val-fraction", "0.3", "--img-size", "32") == 0
    )
    assert load_classifier(str(tmp_path / "run")).class_names == ["blue", "green", "red"]


@pytest.mark.parametrize(
    ("model", "status", "words"),
    [
        ("vit_tiny_patch16_224", 1, "gives outputs of shape"),
        ("deit_tiny_distilled_patch16_224", 1, "has no single linear classifier"),
    ],
)
def test_models_without_one_row_of_features_are_refused(
    model: str, status: int, words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kwargs = {"global_pool": ""} if "distilled" not in model else {}
    made = timm.create_model(model, img_size=32, embed_dim=24, depth=1, num_heads=2, **kwargs)
    timm.models.save_for_hf(made, tmp_path / "source", safe_serialization=True)
    assert probe(tmp_path / "source", data, tmp_path / "run") == status
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["-o", "{run}"], 2, "--output {run} exists already: choose another folder"),
        (["-o", "{run}/../x/features"], 2, "would be the folder of the features, too: choose another name"),
        (
            ["--features-dir", "{data}/train/red/0.png/x"],
            2,
            "--features-dir {data}/train/red/0.png/x cannot be created",
        ),
        (["--val-split", "nothing"], 1, "no split 'nothing'"),
        (["--json", "{data}/train/red/0.png"], 2, "would replace a file that is read"),
    ],
)
def test_mistakes_are_one_sentence(
    flags: list[str],
    status: int,
    words: str,
    run: Path,
    source: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fill(text: str) -> str:
        return text.format(run=run, data=data)

    assert probe(source, data, tmp_path / "new", *map(fill, flags)) == status
    error = capsys.readouterr().err
    assert fill(words) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
