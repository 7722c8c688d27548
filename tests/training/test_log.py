import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from linvit.training.log import EpochLog


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


def test_plain_lines_come_at_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    run(log())
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"epoch 1  (\d+)/10  loss (\S+)", line).groups() for line in lines] == [
        # Means over the four updates since the line before.
        ("4", "2.5000"),
        ("8", "6.5000"),
    ]
    assert re.search(r"img/s  data \d+%  lr 1.00e-03  left \d+:\d\d:\d\d$", lines[0])


def test_updates_of_several_batches_do_not_miss_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    run(log(log_interval=3), step=2)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    run(log(is_shown=False))
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "150")
    run(log())
    shown = capsys.readouterr().out
    assert "epoch 1" in shown
    assert "10/10" in shown
    assert "img/s" in shown


def test_time_spent_waiting_for_batches_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
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
    # Only the batches since the start count: three of four images.
    assert epoch_log.timing() == {"seconds": 12.0, "data_wait": 0.75, "images_per_second": 1.0}


def test_the_time_left_is_that_of_all_epochs_to_come(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("linvit.training.log.time", SimpleNamespace(perf_counter=lambda: now))
    with log(log_interval=5) as epoch_log:
        for batch in range(1, 6):
            now += 2.0
            epoch_log.update(batch=batch, loss=1.0, lr=1.0)
    # Five batches of this epoch and ten of the last one, two seconds each.
    assert capsys.readouterr().out.endswith("left 0:00:30\n")
