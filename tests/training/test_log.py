"""Progress output, and the trackers, whose packages are imported only if they are requested."""

import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny_runs import make_images, train

from linvit.output.terminal import note
from linvit.training.config import TrainConfig
from linvit.training.log import EpochLog, lasting_output, numbers_of, open_trackers, print_line


def log(**arguments: Any) -> EpochLog:
    defaults = {
        "epoch": 1,
        "num_epochs": 3,
        "first_batch": 0,
        "num_batches": 10,
        "images_per_batch": 4,
        "log_interval": 4,
        "is_shown": True,
    }
    return EpochLog(**defaults | arguments)


def run(epoch_log: EpochLog, *, step: int = 1) -> None:
    with epoch_log:
        for batch in range(epoch_log.first_batch + step, 11, step):
            epoch_log.update(batch=batch, loss=float(batch), lr=1e-3)


def test_plain_lines_are_printed_at_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    run(log())
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"epoch 1  (\d+)/10  loss (\S+)", line).groups() for line in lines] == [
        # Mean losses of the four updates since the previous line.
        ("4", "2.5000"),
        ("8", "6.5000"),
    ]
    assert re.search(r"img/s  data \d+%  lr 1.00e-03  left \d+:\d\d:\d\d$", lines[0])


def test_updates_of_several_batches_do_not_miss_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    run(log(log_interval=3), step=2)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_slow_machine_prints_a_line_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("linvit.training.log.time", SimpleNamespace(perf_counter=lambda: now))
    tracked = []
    with log(log_interval=7, track=lambda numbers, batch: tracked.append(batch)) as epoch_log:
        for batch in range(1, 11):
            now += 4.0
            epoch_log.update(batch=batch, loss=1.0, lr=1.0)
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"epoch 1  (\d+)/10", line).group(1) for line in lines] == ["3", "6", "7", "10"]
    # What trackers log does not depend on the machine.
    assert tracked == [17]


def test_a_slow_update_of_many_batches_prints_lines_before_its_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("linvit.training.log.time", SimpleNamespace(perf_counter=lambda: now))
    with log(log_interval=100, first_batch=2) as epoch_log:
        for batch in range(3, 11):
            now += 4.0
            if batch in (6, 10):
                epoch_log.update(batch=batch, loss=1.0, lr=1.0)
            else:
                epoch_log.show_accumulated(batch=batch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == ["5/10", "6/10", "9/10", "10/10"]
    assert lines[0] == "epoch 1  5/10  accumulating gradients  1.0 img/s"
    assert ["loss" in line for line in lines] == [False, True, False, True]


def test_other_processes_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(log(is_shown=False))
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "150")
    run(log())
    shown = capsys.readouterr().out
    assert "epoch 1" in shown
    assert "10/10" in shown
    assert "img/s" in shown


def test_time_spent_waiting_for_batches_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("linvit.training.log.time", SimpleNamespace(perf_counter=lambda: now))

    def slow() -> Iterator[int]:
        nonlocal now
        for batch in range(3):
            now += 3.0
            yield batch

    epoch_log = log(first_batch=7)
    with epoch_log:
        for batch in epoch_log.timed(slow()):
            now += 1.0
            epoch_log.update(batch=8 + batch, loss=1.0, lr=1.0)
    # Only the batches since the start count: three batches of four images.
    assert epoch_log.timing() == {"seconds": 12.0, "data_wait": 0.75, "images_per_second": 1.0}


def test_the_time_left_covers_all_remaining_epochs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("linvit.training.log.time", SimpleNamespace(perf_counter=lambda: now))
    with log(log_interval=5) as epoch_log:
        for batch in range(1, 6):
            now += 2.0
            epoch_log.update(batch=batch, loss=1.0, lr=1.0)
    # Five batches of this epoch and ten of the next, two seconds each.
    assert capsys.readouterr().out.endswith("left 0:00:30\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


class FakeWandb(ModuleType):
    """Records its calls."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        # The class of the error that ended each run.
        self.finished: list[type[BaseException] | None] = []

    def init(self, **settings: Any) -> "FakeRun":
        if settings["project"] == "forbidden":
            raise self.Error("permission denied\nand more")
        self.started.append(settings)
        return FakeRun(self)


class FakeRun:
    def __init__(self, owner: FakeWandb) -> None:
        self.owner = owner

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.owner.logged.append((step, numbers))

    def __enter__(self) -> "FakeRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.owner.finished.append(kind)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_tracker_packages_are_not_imported_unless_requested(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    assert train(data, tmp_path, epochs=1) == 0


@pytest.mark.parametrize(
    ("flag", "package", "blocked"),
    [("log_wandb", "wandb", "wandb"), ("log_tensorboard", "tensorboard", "torch.utils.tensorboard")],
)
def test_a_missing_package_is_refused_in_one_sentence(
    flag: str, package: str, blocked: str, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, blocked, None)
    assert train(data, tmp_path, **{flag: True}) == 1
    words = f"--{flag.replace('_', '-')} needs the package {package}: pip install 'linvit[log]', or remove the flag"
    assert capsys.readouterr().err == f"error: {words}\n"


def test_lines_and_epochs_are_logged(data: Path, tmp_path: Path, wandb: FakeWandb) -> None:
    settings = {"wandb_project": "vits", "wandb_tags": ["a", "b"], "log_interval": 2, "model_ema": True}
    assert train(data, tmp_path, log_wandb=True, **settings) == 0
    (started,) = wandb.started
    assert (started["project"], started["name"], started["tags"]) == ("vits", "run", ["a", "b"])
    assert (started["id"], started["resume"], started["config"]["lr"]) == (None, None, 1e-3)
    assert started["dir"] == str(tmp_path / "run")
    # An epoch has three batches: a line after the second, then the epoch.
    assert [step for step, _ in wandb.logged] == [2, 3, 5, 6]
    lines, epochs = wandb.logged[0::2], wandb.logged[1::2]
    for _, numbers in lines:
        assert set(numbers) == {"train/loss", "train/lr", "train/images_per_second", "train/data_wait"}
    for _, numbers in epochs:
        assert {"epoch/train_loss", "epoch/eval_top1", "epoch/eval_ema_top1", "epoch/lr"} <= set(numbers)


def test_a_wandb_run_can_be_resumed(data: Path, tmp_path: Path, wandb: FakeWandb) -> None:
    assert train(data, tmp_path, epochs=1, log_wandb=True, wandb_resume_id="1a2b") == 0
    assert (wandb.started[0]["id"], wandb.started[0]["resume"]) == ("1a2b", "must")
    assert wandb.finished == [None]


def test_trackers_are_closed_at_the_end_and_after_an_error(tmp_path: Path, wandb: FakeWandb) -> None:
    pytest.importorskip("tensorboard")
    config = TrainConfig(data_dir=Path("data"), log_tensorboard=True, log_wandb=True)
    threads = set(threading.enumerate())

    def fail() -> None:
        with open_trackers(config, tmp_path, first_batch=0) as track:
            track({"train/loss": 1.0}, 2)
            assert set(threading.enumerate()) != threads
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert set(threading.enumerate()) <= threads
    assert wandb.finished == [OSError]


def test_a_wandb_error_is_one_sentence(data: Path, tmp_path: Path, wandb: FakeWandb, capsys: Any) -> None:
    assert train(data, tmp_path, log_wandb=True, wandb_project="forbidden") == 1
    error = capsys.readouterr().err
    assert "--log-wandb: wandb does not start (permission denied); run `wandb login`" in error
    assert error.count("\n") == 1


def test_tensorboard_reads_the_logged_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrainConfig(data_dir=Path("data"), log_tensorboard=True)
    with open_trackers(config, tmp_path, first_batch=0) as track:
        for batch in (2, 4, 6):
            track({"train/loss": batch / 2}, batch)
    # A run that resumes after the fourth batch trains on the sixth again.
    with open_trackers(config, tmp_path, first_batch=5) as track:
        track({"train/loss": 7.0}, 6)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(2, 1.0), (4, 2.0), (6, 7.0)]


def test_only_numbers_are_logged() -> None:
    row = {"epoch": 3, "train_loss": 0.5, "eval_top1": 40.0, "note": "text", "empty": None}
    assert numbers_of(row) == {"epoch/train_loss": 0.5, "epoch/eval_top1": 40.0}


def test_training_continues_without_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_images(tmp_path / "data")
    reader, writer = os.pipe()
    os.close(reader)
    # Unbuffered, as `print_line` flushes anyway.
    with open(writer, "w", encoding="utf-8") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert train(data, tmp_path, epochs=1) == 0
        assert sys.stdout is broken
    warning = capsys.readouterr().err
    assert warning.startswith("warning: cannot write to stdout: ")
    assert warning.count("\n") == 1
    assert (tmp_path / "run/best/model.safetensors").is_file()


def test_a_run_may_lose_both_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as out, open(os.dup(writer), "w", encoding="utf-8") as errors:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", errors)
        with lasting_output():
            print_line("progress")
            note("a warning")
