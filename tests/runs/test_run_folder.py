"""The folder of a run: saved classifiers that timm loads, and the lock that keeps a second process out."""

import contextlib
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_runs import SETTINGS, make_images, train

import train_imagenet
from linvit.data.augment.build import InputSpec
from linvit.runs.folder import lock_run, save_classifier
from linvit.training.config import TrainConfig

SPEC = InputSpec(
    size=(48, 64), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_pct=0.7, crop_mode="squash"
)
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX file locks")
# A process does not see its own locks.
PROBE = """
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], "ab"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free")
except BlockingIOError:
    print("locked")
"""


def linformer(**arguments: Any) -> Any:
    return timm.create_model("linvit_mini_patch4_64", img_size=(48, 64), num_classes=2, **arguments)


def save(folder: Path, model: Any, **about: Any) -> None:
    save_classifier(folder, model, class_names=["cat", "dog"], spec=SPEC, about=about)


def test_timm_loads_what_was_saved(tmp_path: Path) -> None:
    # safetensors refuses these strides.
    model = linformer(k=8, drop_path_rate=0.3).to(memory_format=torch.channels_last)
    save(tmp_path / "best", model, epoch=3)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True)
    images = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(loaded.eval()(images), model.eval()(images))
    found = timm.data.resolve_model_data_config(loaded)
    assert found == {
        "input_size": (3, 48, 64),
        "interpolation": "bilinear",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "crop_pct": 0.7,
        "crop_mode": "squash",
    }
    config = json.loads((tmp_path / "best/config.json").read_text())
    assert config["label_names"] == ["cat", "dog"]
    assert config["linvit"] == {"epoch": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_full_disk_keeps_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = linformer(), linformer()
    save(tmp_path / "best", old, epoch=1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*best: no space left on device; make room"):
        save(tmp_path / "best", new, epoch=2)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True)
    assert torch.equal(loaded.head.weight, old.head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@contextlib.contextmanager
def holding(run: Path) -> Iterator[int]:
    """The number of a process that holds a run's lock, forked, and of which a child outlives it, as a worker may."""
    reader, writer = os.pipe()
    other = os.fork()
    if other == 0:
        # What is above in this process is the parent's.
        with contextlib.suppress(BaseException):
            os.setsid()
            _lock = lock_run(run)
            if os.fork():
                os.write(writer, b"locked")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(reader, 6) == b"locked"
        yield other
    finally:
        os.killpg(other, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


@posix
def test_a_second_process_is_refused_until_the_first_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_images(tmp_path / "data", train=4, val=1)
    settings = {"epochs": 1, "batch_size": 4}
    assert train(data, tmp_path / "out", **settings) == 0
    with holding(tmp_path / "out/run") as other:
        capsys.readouterr()
        before = sorted((tmp_path / "out/run").rglob("*"))
        assert train(data, tmp_path / "out", resume="auto", **settings | {"epochs": 2}) == 1
        assert "out/run: another process is training in it; wait for it, stop it" in capsys.readouterr().err
        assert sorted((tmp_path / "out/run").rglob("*")) == before
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        assert train(data, tmp_path / "out", resume="auto", **settings | {"epochs": 2}) == 0


def is_locked(run: Path) -> bool:
    """Whether another process finds the folder of a run locked."""
    command = [sys.executable, "-c", PROBE, str(run / ".lock")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout == "locked\n"


@posix
def test_a_run_is_locked_until_it_ends_in_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run = make_images(tmp_path / "data", train=4, val=1), tmp_path / "out/run"
    config = TrainConfig(
        data_dir=data, output=tmp_path / "out", experiment="run", resume="auto", **SETTINGS | {"epochs": 1}
    )
    seen = []

    def validate(*arguments: Any) -> Any:
        seen.append(is_locked(run))
        return evaluate(*arguments)

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("a mistake")

    evaluate = train_imagenet.validate
    monkeypatch.setattr(train_imagenet, "validate", validate)
    # The lock must not depend on the collector of reference cycles.
    gc.disable()
    try:
        assert train_imagenet.train(config) == 0
        assert seen == [True]
        assert not is_locked(run)
        # While an error is handled, its traceback keeps the objects of the run alive.
        with pytest.raises(ValueError, match="eval_metric was top1") as refused:
            train_imagenet.train(config.model_copy(update={"eval_metric": "loss"}))
        assert not is_locked(run), refused
        monkeypatch.setattr(train_imagenet, "validate", fail)
        with pytest.raises(RuntimeError, match="a mistake") as mistake:
            train_imagenet.train(config.model_copy(update={"epochs": 2}))
        assert not is_locked(run), mistake
    finally:
        gc.enable()


@posix
def test_a_process_may_lock_its_own_folder_again(tmp_path: Path) -> None:
    first = lock_run(tmp_path)
    assert first is not None
    first.close()
    assert lock_run(tmp_path) is not None
