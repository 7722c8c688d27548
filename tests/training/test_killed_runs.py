"""Runs that are killed, interrupted or out of disk space end like uninterrupted ones."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same, assert_same_runs, make_images, read_state, read_summary, train

from linvit.runs.checkpoint import list_checkpoints, read_checkpoint, verify_checkpoint
from linvit.training.recorder import Recorder
from linvit.training.step import TrainStep

# Six batches and three updates per epoch, with everything that draws random numbers or keeps state between steps.
EVERYTHING: dict[str, Any] = {
    "batch_size": 4,
    "grad_accum_steps": 2,
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop_path": 0.2,
    "drop": 0.1,
    "model_ema": True,
    "model_ema_warmup": True,
    "model_ema_decay": 0.9,
    "clip_grad": 1.0,
    "reprob": 0.3,
    "aa": "rand-m9-mstd0.5-inc1",
    "warmup_epochs": 1,
    "sched_on_updates": True,
    "share": "layerwise",
    "checkpoint_interval": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


def in_child(call: Callable[[], int]) -> int:
    """Run `call` in another process; returns its exit status, negative if a signal killed it."""

    def child() -> None:
        # Its own process group, as a terminal or a scheduler would signal it.
        os.setpgrp()
        status = 99
        try:
            status = call()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    if process.is_alive():
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
    assert process.exitcode is not None
    return process.exitcode


def at_update(number: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every run call `act` just before update `number`."""
    update = TrainStep.update

    def acting(self: TrainStep) -> Any:
        if self.num_updates == number - 1:
            act()
        return update(self)

    monkeypatch.setattr(TrainStep, "update", acting)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.skipif(torch.cuda.is_available(), reason="results on a GPU are not reproducible to the bit by default")
@pytest.mark.parametrize(
    ("workers", "workers_after", "killed_at", "precision"),
    [
        (0, 2, 2, {}),
        (2, 4, 5, {"amp": True, "amp_dtype": "bfloat16"}),
        (4, 0, 4, {"amp": True, "amp_dtype": "float16", "device": "auto"}),
    ],
)
def test_a_killed_run_ends_like_an_uninterrupted_one(
    workers: int,
    workers_after: int,
    killed_at: int,
    precision: dict[str, Any],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Use the requested number of workers, even if there are fewer cores.
    monkeypatch.setattr("linvit.training.setup.usable_workers", lambda workers: workers)
    settings = EVERYTHING | precision
    assert train(data, tmp_path, "uninterrupted", **settings) == 0
    with monkeypatch.context() as patch:
        at_update(killed_at, kill, patch)
        assert in_child(lambda: train(data, tmp_path, workers=workers, **settings)) == -signal.SIGKILL
    for path in list_checkpoints(tmp_path / "run/checkpoints"):
        verify_checkpoint(path)
    assert train(data, tmp_path, workers=workers_after, resume="auto", **settings) == 0
    assert_same_runs(tmp_path / "run", tmp_path / "uninterrupted")


def test_checkpoints_are_saved_by_updates_and_by_time(data: Path, tmp_path: Path) -> None:
    for experiment, settings, batches in (
        ("updates", {"checkpoint_interval": 2}, [0, 4]),
        ("time", {"checkpoint_minutes": 1e-9}, [0, 2, 4, 6]),
    ):
        assert train(data, tmp_path, experiment, **EVERYTHING | {"checkpoint_interval": None} | settings) == 0
        names = [path.name for path in list_checkpoints(tmp_path / experiment / "checkpoints")]
        assert [name for name in names if name.startswith("state-0000")] == [
            f"state-0000-{batch:06d}" for batch in batches
        ]
    assert_same_runs(tmp_path / "updates", tmp_path / "time")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_a_signal_to_the_process_group_lets_the_workers_finish_the_step(
    number: signal.Signals, status: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = TrainStep.backward
    calls = 0

    def signalled(self: TrainStep, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            # Another process sends it, as a terminal or a scheduler would.
            subprocess.run(["kill", f"-{number.value}", "--", f"-{os.getpgrp()}"], process_group=0, check=True)
        backward(self, *args, **kwargs)

    monkeypatch.setattr(TrainStep, "backward", signalled)
    # On a CPU, since a forked child of a process that used a GPU cannot use it.
    settings = EVERYTHING | {"batch_size": 2, "grad_accum_steps": 12, "device": "cpu"}
    assert in_child(lambda: train(data, tmp_path, workers=2, **settings)) == status
    names = [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")]
    assert names == ["state-0000-000000", "state-0000-000012"]


def test_a_second_ctrl_c_ends_the_run_at_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_update(2, twice, monkeypatch)
    settings = EVERYTHING | {"checkpoint_interval": None}
    assert train(data, tmp_path, **settings) == 130
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["state-0000-000000"]


def test_damaged_newest_checkpoints_are_skipped_and_set_aside(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path, "uninterrupted", **EVERYTHING) == 0
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "uninterrupted", run)
    for path in list_checkpoints(run / "checkpoints")[-2:]:
        (path / "model.safetensors").write_bytes(b"rotten")
    capsys.readouterr()
    # If they still counted, pruning would keep them and delete the new ones.
    assert train(data, tmp_path, resume="auto", checkpoint_hist=1, **EVERYTHING) == 0
    printed = capsys.readouterr().out
    assert "state-0002-000000 cannot be used as a training checkpoint: model.safetensors has 6 bytes, not" in printed
    assert (
        f"set aside a checkpoint that is later than the resumed one: {run}/checkpoints/aside-0-state-0001-000006"
        in printed
    )
    assert "resuming at epoch 1, batch 4" in printed
    assert_same_runs(run, tmp_path / "uninterrupted")
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["state-0002-000000"]


def test_leftovers_of_a_killed_run_are_removed(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, stop_epoch=1) == 0
    leftovers = [tmp_path / "run" / name for name in (".best.part", "checkpoints/.state-0002-000000.part")]
    for folder in leftovers:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    assert train(data, tmp_path, resume="auto") == 0
    assert not any(folder.exists() for folder in leftovers)


def limit_file_sizes() -> None:
    """Make the system refuse files as large as weights."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def unlimited_afterwards() -> Iterator[None]:
    """Not a fixture: before its teardown, pytest could not write a long report."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def limited_file_sizes(epoch: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the system refuse files as large as weights from the start of this epoch to the start of the next."""
    begin_epoch = Recorder.begin_epoch
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def begin(self: Recorder, number: int) -> None:
        self.saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        if number == epoch:
            limit_file_sizes()
        begin_epoch(self, number)

    with unlimited_afterwards(), monkeypatch.context() as patch:
        patch.setattr(Recorder, "begin_epoch", begin)
        yield


def test_a_disk_that_is_full_for_an_epoch_loses_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"epochs": 3, "model_ema": True, "model_ema_decay": 0.5}
    assert train(data, tmp_path, "unharmed", **settings) == 0
    with limited_file_sizes(1, monkeypatch):
        assert train(data, tmp_path, **settings) == 0
    error = capsys.readouterr().err
    assert error.startswith(f"warning: cannot write {tmp_path}/run/last: file too large; make room")
    assert error.endswith("training continues, and the next save retries\n")
    assert error.count("\n") == 1
    assert_same_runs(tmp_path / "run", tmp_path / "unharmed")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "state-0000-000000",
        "state-0001-000000",
        "state-0003-000000",
    ]


def test_a_run_whose_end_cannot_be_saved_fails_and_keeps_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path, "unharmed") == 0
    with limited_file_sizes(1, monkeypatch):
        assert train(data, tmp_path) == 1
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: cannot write")
    assert error.startswith(f"error: cannot write {tmp_path}/run/last: file too large")
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == [".lock"]
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []
    verify_checkpoint(run / "checkpoints/state-0001-000000")
    assert train(data, tmp_path, resume="auto") == 0
    assert_same_runs(run, tmp_path / "unharmed")


def test_a_run_that_cannot_be_saved_does_not_start(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with unlimited_afterwards():
        limit_file_sizes()
        assert train(data, tmp_path) == 1
    assert f"error: cannot write {tmp_path}/run/checkpoints/state-0000-000000" in capsys.readouterr().err


def test_within_an_epoch_changed_batches_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path, **EVERYTHING) == 0
    inside, end = (str(tmp_path / "run/checkpoints" / name) for name in ("state-0001-000002", "state-0001-000000"))
    for settings, sentence in (
        (
            {"batch_size": 8},
            "is at batch 2 of 6 batches of 4 from 24 images, but an epoch now has 3 batches of 8 from 24 images",
        ),
        ({"grad_accum_steps": 3, "sched_on_updates": False}, "at batch 2, within a group of --grad-accum-steps 3"),
        ({"seed": 1}, "seed was 42 and is now 1: this changes the order of the images"),
    ):
        assert train(data, tmp_path, "other", resume=inside, **EVERYTHING | settings) == 1
        error = capsys.readouterr().err
        assert sentence in error
        assert "resume from the end of an epoch" in error
        assert error.count("\n") == 1
        allowed = EVERYTHING | settings | {"sched_on_updates": False}
        assert train(data, tmp_path, "other", resume=end, stop_epoch=1, **allowed) == 0
        capsys.readouterr()
    assert train(data, tmp_path, "other", resume=end, **EVERYTHING | {"batch_size": 8}) == 1
    assert "an epoch had 3 updates and now has 2, which --sched-on-updates counts" in capsys.readouterr().err


def test_changed_settings_are_logged_and_used(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch's `load_state_dict` would restore the old weight decay and learning rate."""
    settings = {"sched": "none", "epochs": 2}
    assert train(data, tmp_path, stop_epoch=1, **settings) == 0
    capsys.readouterr()
    changes = {"weight_decay": 0.3, "lr": 1e-5, "opt_betas": [0.5, 0.6]}
    assert train(data, tmp_path, resume="auto", **settings | changes) == 0
    printed = capsys.readouterr().out
    for line in ("weight_decay: 0.05 → 0.3", "lr: 0.001 → 1e-05", "opt_betas: None → [0.5, 0.6]"):
        assert f"changed setting: {line}\n" in printed
    groups = read_state(tmp_path / "run", "state-0002-000000")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert {(group["lr"], tuple(group["betas"])) for group in groups} == {(1e-5, (0.5, 0.6))}
    assert [float(row["lr"]) for row in read_summary(tmp_path / "run")] == [1e-3, 1e-5]


def test_a_checkpoint_can_provide_the_initial_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(data, tmp_path, model_ema=True, share="layerwise", epochs=1) == 0
    path = tmp_path / "run/checkpoints/state-0001-000000"
    for option in ("initial_checkpoint", "pretrained_path"):
        assert train(data, tmp_path, option, share="layerwise", epochs=1, **{option: str(path)}) == 0
        first = read_checkpoint(tmp_path / option / "checkpoints/state-0000-000000")["state_dict"]
        # As with timm's checkpoints, the moving average is preferred.
        assert_same(first, read_checkpoint(path)["state_dict_ema"])
    (path / "ema.safetensors").write_bytes(b"rotten")
    assert train(data, tmp_path, "rotten", share="layerwise", epochs=1, pretrained_path=str(path)) == 1
