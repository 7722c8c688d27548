"""Refused updates: told with their files, counted in a row, the end of a run, and nothing lost by it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same, make_images, read_state, read_summary, train

from linvit.training.faults import BadSteps, NonFiniteLossError
from linvit.training.state import Progress
from linvit.training.step import TrainStep, Update


def update(outcome: Any = "refused", *, loss: float = math.nan, bad_batches: tuple[int, ...] = ()) -> Update:
    return Update(outcome, loss, gradient_norm=math.inf, stop=False, bad_batches=bad_batches, notes=())


class Watched:
    """Bad steps of a run of one batch an update, with what was said and saved."""

    def __init__(self, most_in_row: int = 10) -> None:
        self.lines: list[str] = []
        self.saved: list[Progress] = []
        self.progress = Progress(epoch=3)
        self.bad_steps = BadSteps(most_in_row, path_of=lambda index: Path(f"{index}.png"), say=self.lines.append)

    def check(self, *updates: Update, indices: tuple[int, ...] = (1, 2)) -> None:
        for each in updates:
            self.bad_steps.add_batch(torch.tensor(indices))
            self.progress.batch += 1
            self.bad_steps.check(each, self.progress, group_start=self.progress.batch - 1, save=self.saved.append)


def test_a_refused_update_is_one_line_with_its_files() -> None:
    watched = Watched()
    watched.check(update(), indices=tuple(range(11)))
    files = ", ".join(f"{number}.png" for number in range(8))
    assert watched.lines == [
        f"refused an update (epoch 3, batch 0): the loss became nan; its images: {files} and 3 more"
    ]
    watched.check(update(loss=1.5))
    assert "the loss is 1.5000 but the norm of the gradients became inf; its images: 1.png, 2.png" in watched.lines[1]
    assert (watched.progress.num_bad, watched.progress.bad_in_row) == (2, 2)


def test_of_a_group_the_batch_that_is_bad_is_named() -> None:
    watched = Watched()
    for index in range(3):
        watched.bad_steps.add_batch(torch.tensor([index]))
    watched.bad_steps.check(update(bad_batches=(1,)), watched.progress, group_start=0, save=watched.saved.append)
    assert watched.lines[0].endswith("its images: 1.png")


def test_only_a_row_ends_the_run() -> None:
    watched = Watched(most_in_row=3)
    watched.check(update(), update(), update("taken", loss=1.0), update(), update("empty"), update("skipped", loss=1.0))
    assert (watched.progress.num_bad, watched.progress.bad_in_row) == (3, 1)
    watched.check(update())
    with pytest.raises(NonFiniteLossError, match=r"refused update number 3 in a row \(--max-bad-steps\)"):
        watched.check(update())
    # Where the row began, and what was counted by then.
    assert watched.saved == [Progress(epoch=3, batch=3, num_bad=2, bad_in_row=0)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


def poison(patch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Make the images of these batches of the run NaN."""
    backward = TrainStep.backward
    calls = 0

    def poisoned(self: TrainStep, images: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> None:
        nonlocal calls
        backward(self, images * math.nan if calls in numbers else images, labels, **kwargs)
        calls += 1

    patch.setattr(TrainStep, "backward", poisoned)


def test_a_run_goes_on_past_a_bad_step_and_counts_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, 1)
        assert train(data, tmp_path, model_ema=True) == 0
    assert "refused an update (epoch 0, batch 1): the loss became nan; its images: " in capsys.readouterr().out
    rows = read_summary(tmp_path / "run")
    assert [row["bad_updates"] for row in rows] == ["1", "1"]
    assert all(math.isfinite(float(row[column])) for row in rows for column in ("train_loss", "eval_loss"))
    state = read_state(tmp_path / "run", "state-0002-000000")
    assert (state["progress"]["num_bad"], state["num_updates"]) == (1, 5)
    assert all(weight.isfinite().all() for weight in state["state_dict_ema"].values())


def test_a_row_ends_the_run_with_a_state_of_before_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, 1, 2)
        assert train(data, tmp_path, max_bad_steps=2, batch_size=4) == 1
    error = capsys.readouterr().err
    assert "error: the loss became nan at epoch 0, batch 2, the refused update number 2 in a row" in error
    assert error.count("\n") == 1
    state = read_state(tmp_path / "run", "state-0000-000001")
    assert (state["progress"]["num_bad"], state["progress"]["batch"], state["num_updates"]) == (0, 1, 1)
    assert train(data, tmp_path, batch_size=4, resume="auto") == 0
    assert train(data, tmp_path, "unharmed", batch_size=4) == 0
    resumed, unharmed = (read_state(tmp_path / name, "state-0002-000000") for name in ("run", "unharmed"))
    for part in ("state_dict", "optimizer", "num_updates"):
        assert_same(resumed[part], unharmed[part])
    assert read_summary(tmp_path / "run") == read_summary(tmp_path / "unharmed")


def test_a_row_may_go_on_from_epoch_to_epoch_and_over_a_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, 1, 2)
        assert train(data, tmp_path, max_bad_steps=3, stop_epoch=1) == 0
    state = read_state(tmp_path / "run", "state-0001-000000")
    assert state["progress"]["bad_in_row"] == 2
    with monkeypatch.context() as patch:
        poison(patch, 0)
        assert train(data, tmp_path, max_bad_steps=3, resume="auto") == 1
