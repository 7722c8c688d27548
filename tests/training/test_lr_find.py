"""`linvit lr-find`: the sweep finds where the loss falls and where it diverges, and writes both down."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import SETTINGS, make_images

from linvit.cli import main
from linvit.distributed import Ranks
from linvit.training.config import TrainConfig
from linvit.training.sweep import Sweep, prepare_sweep, run_sweep


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


def find(data: Path, folder: Path, *flags: str, **settings: object) -> int:
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, **settings}))
    files = ["--json", str(folder / "found.json"), "--plot", str(folder / "found.png")]
    return main(["lr-find", str(data), "--config", str(folder / "config.yaml"), *files, *flags])


def test_points_of_a_curve() -> None:
    lr = [10.0**exponent for exponent in range(-6, 2)]
    found = Sweep(lr, loss=[0.0] * 8, smoothed=[2.0, 1.99, 1.9, 1.5, 1.1, 1.0, 1.5, 9.0])
    assert (found.lowest, found.steepest, found.suggestion) == (0.1, 1e-3, pytest.approx(0.01))


def test_the_first_losses_do_not_count_as_a_fall() -> None:
    lr = [10.0 ** (exponent / 10) for exponent in range(-60, 10)]
    # A high first loss, a plateau, a slope and a divergence.
    smoothed = [3.0, *[2.0] * 29, *[2.0 - step / 20 for step in range(20)], *[1.05 + step for step in range(20)]]
    found = Sweep(lr, loss=smoothed, smoothed=smoothed)
    assert 1e-3 < found.steepest < 1e-1


def test_the_sweep_ends_when_the_loss_diverges(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frozen = {"share": "layerwise", "freeze": ["blocks.0"]}
    assert find(data, tmp_path, "--start-lr", "1e-4", "--end-lr", "1e4", "--num-steps", "40", opt="sgd", **frozen) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["lr"]) == len(found["loss"]) == len(found["smoothed"]) < 40
    assert found["lr"][0] == pytest.approx(1e-4)
    steps = [b / a for a, b in zip(found["lr"], found["lr"][1:])]
    assert steps == pytest.approx([1e8 ** (1 / 39)] * len(steps))
    assert 1e-4 <= found["steepest"] <= found["lowest"] < found["lr"][-1]
    assert all(map(math.isfinite, found["smoothed"]))
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    log = capsys.readouterr().out
    assert f"suggestion: --lr {found['suggestion']:.1e}" in log
    assert "--freeze also freezes blocks.1.attn.key_projection.weight_h, " in log
    # No other files remain.
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "found.json", "found.png"}


def test_a_sweep_is_reproducible(data: Path, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        settings = {"mixup": 0.5, "grad_accum_steps": 2, "drop_path": 0.1, "layer_decay": 0.9}
        assert find(data, tmp_path / name, "--end-lr", "0.1", "--num-steps", "12", **settings) == 0
        found.append((tmp_path / name / "found.json").read_text())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--start-lr", "1", "--end-lr", "0.1"], 2, "--start-lr 1 must be below --end-lr 0.1"),
        (["--num-stesp", "20"], 2, "unknown option '--num-stesp'; did you mean '--num-steps'?"),
        (["--num-steps", "2"], 2, "--num-steps takes a whole number of at least 10, not 2"),
        (["--start-lr", "1e6", "--end-lr", "1e7", "--opt", "sgd"], 1, "does not fall above --start-lr"),
    ],
)
def test_mistakes_are_reported(
    flags: list[str], status: int, words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find(data, tmp_path, *flags) == status
    assert words in capsys.readouterr().err


def test_steps_without_a_readable_image_are_left_out(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", classes=("blue", "red"), train=4)
    for path in data.glob("train/*/[123].png"):
        path.write_bytes(b"")
    config = TrainConfig.model_validate(
        {**SETTINGS, "img_size": (32, 32), "data_dir": data, "batch_size": 1, "on_bad_image": "skip"}
    )
    ranks = Ranks(torch.device("cpu"))
    step, loader = prepare_sweep(config, ranks)
    found = run_sweep(step, loader, config, ranks, start_lr=1e-6, end_lr=1e-5, num_steps=8)
    assert len(found.loss) == 2
    assert min(found.loss) > 0
    for path in data.glob("train/*/0.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no image of an epoch can be read"):
        run_sweep(step, loader, config, ranks, start_lr=1e-6, end_lr=1e-5, num_steps=9)
