"""`linvit average`: the mean of weights of one model, in a folder that timm loads."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny_runs import make_images, train

from linvit.cli import main
from linvit.runs.average import average


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    assert train(data, output, "first", epochs=3, model_ema=True, model_ema_decay=0.5, lr=0.01) == 0
    assert train(data, output, "second", epochs=1, seed=1) == 0
    return output


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    return load_file(file / "model.safetensors" if file.is_dir() else file)


def assert_mean(averaged: Path, files: list[Path]) -> None:
    parts = [weights_of(file) for file in files]
    for name, tensor in weights_of(averaged).items():
        expected = torch.stack([part[name].double() for part in parts]).mean(0).to(tensor.dtype)
        assert torch.equal(tensor, expected), name


def test_the_epochs_of_a_run_are_averaged(runs: Path, data: Path, tmp_path: Path) -> None:
    assert main(["average", str(runs / "first"), "-o", str(tmp_path / "all")]) == 0
    ends = [runs / f"first/checkpoints/state-000{epoch}-000000" for epoch in (1, 2, 3)]
    assert_mean(tmp_path / "all", ends)
    assert main(["average", str(runs / "first"), "-o", str(tmp_path / "two"), "--newest", "2"]) == 0
    assert_mean(tmp_path / "two", ends[1:])
    assert main(["average", str(runs / "first"), "-o", str(tmp_path / "ema"), "--use-ema"]) == 0
    assert_mean(tmp_path / "ema", [end / "ema.safetensors" for end in ends])


def test_several_runs_and_folders_are_averaged(runs: Path, data: Path, tmp_path: Path) -> None:
    sources = [runs / "first", runs / "second", runs / "second/last"]
    assert main(["average", *map(str, sources), "-o", str(tmp_path / "average")]) == 0
    assert_mean(tmp_path / "average", [runs / "first/best", runs / "second/best", runs / "second/last"])


def test_timm_and_eval_load_the_average(runs: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "average"
    assert main(["average", str(runs / "first"), "-o", str(folder)]) == 0
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert main(["eval", str(folder), str(data), "-j", "0"]) == 0


def test_sums_are_in_double_precision(tmp_path: Path) -> None:
    # In single precision the small values would vanish next to the large one.
    for number, value in enumerate([2.0**25, 1.0, 1.0, 1.0]):
        torch.save(
            {"state_dict": {"w": torch.full((2,), value), "n": torch.tensor(number)}}, tmp_path / f"{number}.pth"
        )
    means, files = average([tmp_path / f"{number}.pth" for number in range(4)])
    assert means["w"].dtype == torch.float32
    assert means["w"].tolist() == [2.0**23 + 1] * 2
    # Integers are taken from the last one.
    assert means["n"].item() == 3
    assert len(files) == 4


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"w": torch.zeros(2), "b": torch.zeros(1)}, "are not of one model: only one has b"),
        ({"w": torch.zeros(3)}, "are not of one model: shapes differ for w"),
    ],
)
def test_weights_of_other_models_are_refused(other: dict, words: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(2)}}, tmp_path / "a.pth")
    torch.save({"state_dict": other}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=words):
        average([tmp_path / "a.pth", tmp_path / "b.pth"])


def test_wrong_usage_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_images(tmp_path / "other", classes=("blue", "green", "grey"))
    assert train(other, tmp_path, "other-run", epochs=1) == 0
    first, output = str(runs / "first"), ["-o", str(tmp_path / "average")]
    for argv, words in (
        ([first, str(tmp_path / "other-run"), *output], "have different classes"),
        ([str(runs / "first/best"), *output], "is not the folder of a run: give a run, or several weights"),
        ([first, str(runs / "second"), "--newest", "1", *output], "--newest selects checkpoints of one run"),
        ([first, "-o", str(tmp_path)], "exists already"),
        ([first], "--output is missing"),
        (output, "SOURCE"),
    ):
        capsys.readouterr()
        assert main(["average", *argv]) in (1, 2)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "average").exists()
