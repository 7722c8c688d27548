"""Numbers go to TensorBoard and wandb where asked for, and neither is loaded otherwise."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny_runs import make_images, train

from linvit.training.config import TrainConfig
from linvit.training.log import numbers_of, open_trackers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


class FakeWandb(ModuleType):
    """Remembers what it is told."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []

    def init(self, **settings: Any) -> SimpleNamespace:
        if settings["project"] == "forbidden":
            raise self.Error("permission denied\nand more")
        self.started.append(settings)
        return SimpleNamespace(log=lambda numbers, step: self.logged.append((step, numbers)))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_nothing_is_loaded_unless_asked_for(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    assert train(data, tmp_path, epochs=1) == 0


@pytest.mark.parametrize(
    ("flag", "package", "blocked"),
    [("log_wandb", "wandb", "wandb"), ("log_tensorboard", "tensorboard", "torch.utils.tensorboard")],
)
def test_a_missing_package_is_one_sentence(
    flag: str, package: str, blocked: str, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, blocked, None)
    assert train(data, tmp_path, **{flag: True}) == 1
    words = f"--{flag.replace('_', '-')} needs the package {package}: pip install 'linvit[log]', or leave the flag out"
    assert capsys.readouterr().err == f"error: {words}\n"


def test_lines_and_epochs_are_logged(data: Path, tmp_path: Path, wandb: FakeWandb) -> None:
    settings = {"wandb_project": "vits", "wandb_tags": ["a", "b"], "log_interval": 2, "model_ema": True}
    assert train(data, tmp_path, log_wandb=True, **settings) == 0
    (started,) = wandb.started
    assert (started["project"], started["name"], started["tags"]) == ("vits", "run", ["a", "b"])
    assert (started["id"], started["resume"], started["config"]["lr"]) == (None, None, 1e-3)
    assert started["dir"] == str(tmp_path / "run")
    # Three batches an epoch: a line after the second, then the epoch.
    assert [step for step, _ in wandb.logged] == [2, 3, 5, 6]
    lines, epochs = wandb.logged[0::2], wandb.logged[1::2]
    for _, numbers in lines:
        assert set(numbers) == {"train/loss", "train/lr", "train/images_per_second", "train/data_wait"}
    for _, numbers in epochs:
        assert {"epoch/train_loss", "epoch/eval_top1", "epoch/eval_ema_top1", "epoch/lr"} <= set(numbers)


def test_a_run_can_be_gone_on_with_there(data: Path, tmp_path: Path, wandb: FakeWandb) -> None:
    assert train(data, tmp_path, epochs=1, log_wandb=True, wandb_resume_id="1a2b") == 0
    assert (wandb.started[0]["id"], wandb.started[0]["resume"]) == ("1a2b", "must")


def test_a_refusal_is_one_sentence(data: Path, tmp_path: Path, wandb: FakeWandb, capsys: Any) -> None:
    assert train(data, tmp_path, log_wandb=True, wandb_project="forbidden") == 1
    error = capsys.readouterr().err
    assert "--log-wandb does not start: permission denied; log in by `wandb login`" in error
    assert error.count("\n") == 1


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrainConfig(data_dir=Path("data"), log_tensorboard=True)
    track = open_trackers(config, tmp_path, first_batch=0)
    for batch in (2, 4, 6):
        track({"train/loss": batch / 2}, batch)
    # Going on from the fourth batch, the sixth is trained on again.
    open_trackers(config, tmp_path, first_batch=5)({"train/loss": 7.0}, 6)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(2, 1.0), (4, 2.0), (6, 7.0)]


def test_only_numbers_are_logged() -> None:
    row = {"epoch": 3, "train_loss": 0.5, "eval_top1": 40.0, "note": "text", "empty": None}
    assert numbers_of(row) == {"epoch/train_loss": 0.5, "epoch/eval_top1": 40.0}
