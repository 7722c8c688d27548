"""Compare a run that is stopped within an epoch and resumed with an uninterrupted run."""

import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import read_summary, train

from linvit.training.step import TrainStep


def assert_stopping_changes_nothing(
    data: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *, after: int, **settings: Any
) -> None:
    """Fail unless a run stopped at update number `after` and then resumed ends with the same weights and summary.

    The resumed run loads its images in other processes.
    """
    assert train(data, output, "uninterrupted", **settings) == 0
    backward = TrainStep.backward
    calls = 0

    def interrupted(self: TrainStep, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            signal.raise_signal(signal.SIGTERM)
        backward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "backward", interrupted)
        assert train(data, output, "halves", **settings) == 128 + signal.SIGTERM
    assert train(data, output, "halves", resume="auto", **{**settings, "workers": 2}) == 0
    assert read_summary(output / "halves") == read_summary(output / "uninterrupted")
    for weights in ("best", "last"):
        halves, uninterrupted = (output / run / weights / "model.safetensors" for run in ("halves", "uninterrupted"))
        assert halves.read_bytes() == uninterrupted.read_bytes()
