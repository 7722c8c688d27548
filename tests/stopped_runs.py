"""Runs that are stopped inside an epoch and gone on with, against the run left alone."""

import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import read_summary, train

from linvit.training.step import TrainStep


def assert_stopping_changes_nothing(
    data: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *, after: int, **settings: Any
) -> None:
    """Fail unless a run that is asked to stop at its update number `after` and then resumed, its images now loaded by
    other processes, ends with the same weights and summary."""
    assert train(data, output, "whole", **settings) == 0
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
    assert read_summary(output / "halves") == read_summary(output / "whole")
    for weights in ("best", "last"):
        halves, whole = (output / run / weights / "model.safetensors" for run in ("halves", "whole"))
        assert halves.read_bytes() == whole.read_bytes()
