"""Where a run starts, and which changed settings a resumed run allows."""

import os
from pathlib import Path
from typing import Any

import pytest
import tiny_runs  # noqa: F401  it adds the folder of train_imagenet.py to the path
import torch

import train_imagenet
from linvit.runs.checkpoint import write_checkpoint
from linvit.training.config import TrainConfig
from linvit.training.resume import StartingPoint, changed_settings, check_output, check_settings, choose_start


def config(output: Path, **settings: Any) -> TrainConfig:
    return TrainConfig.model_validate({"data_dir": "data", "output": output, "experiment": "run"} | settings)


def start(output: Path, **settings: Any) -> StartingPoint:
    return choose_start(config(output, **settings), img_size=(64, 64))


def make_run(folder: Path, *epochs: int) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "args.yaml").touch()
    for epoch in epochs:
        progress = {"epoch": epoch, "batch": 0}
        write_checkpoint(
            folder / "checkpoints", {"progress": progress, "state_dict": {"a": torch.ones(2)}, "state_dict_ema": None}
        )
    return folder


def test_an_existing_folder_is_never_reused(tmp_path: Path) -> None:
    assert start(tmp_path) == StartingPoint(tmp_path / "run")
    assert start(tmp_path) == StartingPoint(tmp_path / "run-1")
    assert start(tmp_path) == StartingPoint(tmp_path / "run-2")


def test_the_default_name_has_time_model_and_size(tmp_path: Path) -> None:
    name = start(tmp_path, experiment=None, model="linvit_mini_patch4_64").folder.name
    date, time, rest = name.split("-", 2)
    assert (len(date), len(time), rest) == (8, 6, "linvit_mini_patch4_64-64")


def test_auto_resumes_from_the_newest_checkpoint_or_starts_a_run(tmp_path: Path) -> None:
    assert start(tmp_path, resume="auto") == StartingPoint(tmp_path / "run")
    make_run(tmp_path / "other", 1, 2, 10)
    found = start(tmp_path, resume="auto", experiment="other")
    assert found == StartingPoint(tmp_path / "other", tmp_path / "other/checkpoints/state-0010-000000")


def test_auto_starts_over_in_a_folder_without_checkpoints(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    assert start(tmp_path, resume="auto") == StartingPoint(tmp_path / "run")


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "manifest.json"])
def test_auto_falls_back_from_a_damaged_checkpoint(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", 1, 2)
    newest = run / "checkpoints/state-0002-000000" / name
    newest.write_bytes(newest.read_bytes()[:100])
    assert start(tmp_path, resume="auto").state == run / "checkpoints/state-0001-000000"
    printed = capsys.readouterr().out
    assert "state-0002-000000 cannot be used as a training checkpoint: " + name in printed
    assert printed.endswith("; trying the one before\n")
    assert printed.count("\n") == 1
    # A damaged checkpoint that is given by its path is refused.
    with pytest.raises(ValueError, match="state-0002-000000 cannot be used"):
        start(tmp_path, resume=str(newest.parent))


def test_results_without_a_readable_checkpoint_are_not_overwritten(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    (run / "checkpoints/state-0001-000000/training.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="run: none of its checkpoints can be read; choose another --experiment"):
        start(tmp_path, resume="auto")
    make_run(tmp_path / "finished")
    (tmp_path / "finished/best").mkdir()
    with pytest.raises(ValueError, match="none of its checkpoints"):
        start(tmp_path, resume="auto", experiment="finished")


def test_a_path_resumes_in_its_own_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "here", 1, 2)
    older = run / "checkpoints/state-0001-000000"
    assert start(tmp_path / "out", experiment=None, resume=str(run)).folder == run
    assert start(tmp_path / "out", experiment=None, resume=str(older)) == StartingPoint(run, older)
    assert start(tmp_path, experiment="here", resume=str(older)) == StartingPoint(run, older)


def test_a_path_with_another_experiment_starts_a_new_run(tmp_path: Path) -> None:
    older = make_run(tmp_path / "here", 1) / "checkpoints/state-0001-000000"
    assert start(tmp_path, experiment="there", resume=str(older)) == StartingPoint(tmp_path / "there", older)


def test_a_path_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--resume nowhere: there is no such file or folder"):
        start(tmp_path, resume="nowhere")
    run = make_run(tmp_path / "empty")
    with pytest.raises(ValueError, match="the run has no checkpoints yet"):
        start(tmp_path, resume=str(run))
    (run / "weights.pth").touch()
    with pytest.raises(ValueError, match=r"weights.pth: this is a file; give a run's folder .* --pretrained-path"):
        start(tmp_path, resume=str(run / "weights.pth"))


def test_an_output_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output .*file: cannot create .*run \(Not a directory\)"):
        start(tmp_path / "file")


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--output .*x: file name too long; choose another --output or --experiment"):
        check_output(config(tmp_path, experiment="x" * 300))


SETTINGS: dict[str, Any] = TrainConfig(data_dir="images", model="linvit_tiny_patch16_224", k=32).model_dump(mode="json")


def check(within_epoch: bool = False, with_optimizer: bool = True, **changes: Any) -> None:
    assert changes.keys() <= SETTINGS.keys()
    check_settings(SETTINGS, SETTINGS | changes, within_epoch=within_epoch, with_optimizer=with_optimizer)


def test_changed_settings_are_listed() -> None:
    now = SETTINGS | {"epochs": 5, "resume": "auto", "experiment": "b", "stop_epoch": 3}
    assert changed_settings(SETTINGS, now) == ["epochs: 300 → 5"]


@pytest.mark.parametrize(
    "change", [{"lr": 0.1}, {"epochs": 5}, {"workers": 2}, {"weight_decay": 0.1}, {"drop_path": 0.1}, {"amp": True}]
)
def test_meaningful_changes_are_allowed_anywhere(change: dict[str, Any]) -> None:
    check(within_epoch=True, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "linvit_small_patch16_224"},
        {"k": 64},
        {"projection": "dct"},
        {"share": "layerwise"},
        {"gp": "avg"},
        {"model_kwargs": {"depth": 3}},
        {"input_range": [0, 4095]},
        {"eval_metric": "loss"},
    ],
)
def test_another_model_or_metric_is_refused(change: dict[str, Any]) -> None:
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"^--resume: {name} was .* and is now .*: a run keeps its model"):
        check(with_optimizer=False, **change)


def test_another_optimizer_is_refused_unless_its_state_is_fresh() -> None:
    for change in ({"opt": "lion"}, {"opt_kwargs": {"foreach": False}}, {"freeze": ["backbone"]}):
        with pytest.raises(ValueError, match=r"with a fresh optimizer \(--no-resume-opt\)"):
            check(**change)
        check(with_optimizer=False, **change)


def test_within_an_epoch_the_order_of_images_may_not_change() -> None:
    for change in ({"seed": 3}, {"sampler": "balanced"}, {"aug_repeats": 3.0}):
        with pytest.raises(ValueError, match="the order of the images within an epoch"):
            check(within_epoch=True, **change)
        check(**change)


def test_a_new_setting_does_not_count_as_a_change() -> None:
    before = {name: value for name, value in SETTINGS.items() if name != "share"}
    check_settings(before, SETTINGS | {"share": "kv"}, within_epoch=True, with_optimizer=True)


def test_an_output_that_cannot_be_written_is_found_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    arguments = [str(tmp_path / "no data"), "--output"]
    assert train_imagenet.main([*arguments, str(tmp_path / "file/sub")]) == 1
    assert f"--output {tmp_path}/file/sub: {tmp_path}/file is not a folder" in capsys.readouterr().err
    # Root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert train_imagenet.main([*arguments, str(tmp_path / "a/b")]) == 1
    assert f"{tmp_path} cannot be written; choose another folder" in capsys.readouterr().err
