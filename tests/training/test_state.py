import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from linvit.training.metrics import Metrics
from linvit.training.state import Progress, changed_settings, list_states, load_state, save_state


def state_at(epoch: int, batch: int = 0) -> dict[str, Any]:
    return {
        "format": 1,
        "progress": {"epoch": epoch, "batch": batch},
        "state_dict": {"weight": torch.full((3,), epoch)},
    }


def names(folder: Path) -> list[str]:
    return [path.name for path in list_states(folder)]


def test_old_states_go_when_the_new_one_is_there(tmp_path: Path) -> None:
    for epoch in range(1, 6):
        save_state(tmp_path, state_at(epoch), keep=2, milestones=[1])
    # Epoch 1, counted from 0, ends with the second state.
    assert names(tmp_path) == ["state-0002-000000.pth", "state-0004-000000.pth", "state-0005-000000.pth"]
    assert load_state(tmp_path / "state-0004-000000.pth")["state_dict"]["weight"].tolist() == [4, 4, 4]


def test_states_are_in_the_order_of_the_run(tmp_path: Path) -> None:
    for epoch, batch in ((2, 0), (1, 7), (1, 0), (1, 100_000), (10_000, 0)):
        save_state(tmp_path, state_at(epoch, batch), keep=9, milestones=[])
    (tmp_path / "state-notes.pth").touch()
    assert names(tmp_path) == [
        "state-0001-000000.pth",
        "state-0001-000007.pth",
        "state-0001-100000.pth",
        "state-0002-000000.pth",
        "state-10000-000000.pth",
    ]


def test_a_full_disk_keeps_every_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for epoch in (1, 2):
        save_state(tmp_path, state_at(epoch), keep=2, milestones=[])

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*state-0003-000000.pth: no space left on device"):
        save_state(tmp_path, state_at(3), keep=2, milestones=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-0001-000000.pth", "state-0002-000000.pth"]


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    whole = save_state(tmp_path, state_at(1), keep=2, milestones=[]).read_bytes()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.pth cannot be read as a training state"):
        load_state(cut)
    foreign = tmp_path / "foreign.pth"
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(ValueError, match=r"foreign.pth is not a training state of linvit; .* --pretrained-path"):
        load_state(foreign)


def test_changed_settings_are_told() -> None:
    before = {"lr": 0.1, "epochs": 3, "resume": None, "experiment": "a"}
    now = {"lr": 0.1, "epochs": 5, "resume": "auto", "experiment": "b"}
    assert changed_settings(before, now) == ["epochs: 3 → 5"]


def evaluation(top1: float, loss: float = 1.0) -> Metrics:
    return Metrics(loss=loss, top1=top1, top5=100.0, num_images=1, per_class={}, images_per_class={})


def test_the_best_and_the_patience() -> None:
    progress = Progress()
    verdicts = []
    for raw, ema in ((50.0, 40.0), (50.0, 45.0), (49.0, 60.0), (60.0, 60.0), (float("nan"), 10.0)):
        verdicts.append(progress.judge({"raw": evaluation(raw), "ema": evaluation(ema)}, "top1"))
    assert verdicts == ["raw", None, "ema", None, None]
    assert progress.best == 60.0
    assert progress.is_out_of_patience(2)
    assert not progress.is_out_of_patience(3)
    assert not progress.is_out_of_patience(None)


def test_an_epoch_ends_with_its_mean_loss() -> None:
    progress = Progress(epoch=3, batch=8)
    for loss in (1.0, 2.0, 6.0):
        progress.add_loss(loss)
    assert progress.end_epoch() == 3.0
    assert progress == Progress(epoch=4)
