from pathlib import Path
from typing import Any

import pytest
import torch

from linvit.runs.checkpoint import write_checkpoint
from linvit.training.config import TrainConfig
from linvit.training.state import StartingPoint, choose_start


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


def test_a_folder_that_is_there_is_never_used_again(tmp_path: Path) -> None:
    assert start(tmp_path) == StartingPoint(tmp_path / "run")
    assert start(tmp_path) == StartingPoint(tmp_path / "run-1")
    assert start(tmp_path) == StartingPoint(tmp_path / "run-2")


def test_the_default_name_tells_time_model_and_size(tmp_path: Path) -> None:
    name = start(tmp_path, experiment=None, model="linvit_mini_patch4_64").folder.name
    date, time, rest = name.split("-", 2)
    assert (len(date), len(time), rest) == (8, 6, "linvit_mini_patch4_64-64")


def test_auto_goes_on_from_the_newest_state_or_begins(tmp_path: Path) -> None:
    assert start(tmp_path, resume="auto") == StartingPoint(tmp_path / "run")
    make_run(tmp_path / "other", 1, 2, 10)
    found = start(tmp_path, resume="auto", experiment="other")
    assert found == StartingPoint(tmp_path / "other", tmp_path / "other/checkpoints/state-0010-000000")


def test_auto_begins_again_in_a_folder_that_has_nothing_yet(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    assert start(tmp_path, resume="auto") == StartingPoint(tmp_path / "run")


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "manifest.json"])
def test_auto_goes_back_past_a_broken_state(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 1, 2)
    newest = run / "checkpoints/state-0002-000000" / name
    newest.write_bytes(newest.read_bytes()[:100])
    assert start(tmp_path, resume="auto").state == run / "checkpoints/state-0001-000000"
    said = capsys.readouterr().out
    assert "state-0002-000000 cannot be used as a training checkpoint: " + name in said
    assert said.endswith("; going back to the one before\n")
    assert said.count("\n") == 1
    # Asked for by its path, it is refused.
    with pytest.raises(ValueError, match="state-0002-000000 cannot be used"):
        start(tmp_path, resume=str(newest.parent))


def test_results_without_a_readable_state_are_not_overwritten(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    (run / "checkpoints/state-0001-000000/training.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="run: none of its training states can be read; choose another --experiment"):
        start(tmp_path, resume="auto")
    make_run(tmp_path / "finished")
    (tmp_path / "finished/best").mkdir()
    with pytest.raises(ValueError, match="none of its training states"):
        start(tmp_path, resume="auto", experiment="finished")


def test_a_path_goes_on_in_its_own_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "here", 1, 2)
    older = run / "checkpoints/state-0001-000000"
    assert start(tmp_path / "out", experiment=None, resume=str(run)).folder == run
    assert start(tmp_path / "out", experiment=None, resume=str(older)) == StartingPoint(run, older)
    assert start(tmp_path, experiment="here", resume=str(older)) == StartingPoint(run, older)


def test_a_path_and_another_experiment_make_a_new_run(tmp_path: Path) -> None:
    older = make_run(tmp_path / "here", 1) / "checkpoints/state-0001-000000"
    assert start(tmp_path, experiment="there", resume=str(older)) == StartingPoint(tmp_path / "there", older)


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--resume nowhere: there is no such file or folder"):
        start(tmp_path, resume="nowhere")
    run = make_run(tmp_path / "empty")
    with pytest.raises(ValueError, match="the run has no training states"):
        start(tmp_path, resume=str(run))
    (run / "weights.pth").touch()
    with pytest.raises(ValueError, match=r"weights.pth: is a file; give a run's folder .* --pretrained-path"):
        start(tmp_path, resume=str(run / "weights.pth"))


def test_an_output_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output .*file: cannot make .*run there \(Not a directory\)"):
        start(tmp_path / "file")
