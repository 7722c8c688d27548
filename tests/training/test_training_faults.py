"""Images that cannot be read, and updates that are refused: logged, counted, and without effect on the weights."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same, make_images, read_state, read_summary, train

from linvit.training.faults import BadImages, BadSteps, NonFiniteLossError
from linvit.training.recorder import Recorder
from linvit.training.state import Progress
from linvit.training.step import TrainStep, Update


def test_bad_images_are_logged_each_epoch_and_listed_once_and_sorted(tmp_path: Path) -> None:
    file, lines = tmp_path / "bad_images.txt", []
    for resumed in (False, True):
        bad_images = BadImages(file, is_primary=True, log=lines.append)
        bad_images.end_epoch()
        assert file.exists() == resumed
        bad_images.add([Path("c.png"), Path("a.png"), Path("c.png")])
        bad_images.end_epoch()
        bad_images.add([Path("b.png")])
        bad_images.end_epoch()
    assert file.read_text() == "a.png\nb.png\nc.png\n"
    assert lines[:2] == [
        f"skipped 2 images that cannot be read: a.png, c.png ({file})",
        f"skipped 1 image that cannot be read: b.png ({file})",
    ]


def test_a_name_that_is_not_utf8_is_listed_in_every_epoch(tmp_path: Path) -> None:
    for name in ("caf\udce9.png", "a.png"):
        bad_images = BadImages(tmp_path / "bad_images.txt", is_primary=True, log=lambda text: None)
        bad_images.add([Path(name)])
        bad_images.end_epoch()
    assert (tmp_path / "bad_images.txt").read_bytes() == b"a.png\ncaf\xe9.png\n"


def test_only_the_first_of_many_bad_images_are_logged(tmp_path: Path) -> None:
    lines: list[str] = []
    bad_images = BadImages(tmp_path / "bad_images.txt", is_primary=True, log=lines.append)
    bad_images.add(Path(f"{number:02}.png") for number in range(20))
    bad_images.end_epoch()
    assert "07.png and 12 more" in lines[0]
    assert len((tmp_path / "bad_images.txt").read_text().splitlines()) == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_skips_and_lists_bad_images(workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_images(tmp_path / "data")
    broken = sorted(data / name for name in ("train/blue/1.png", "train/red/7.png", "val/green/0.png"))
    for path in broken:
        path.write_bytes(b"")
    settings = {"mixup": 0.8, "grad_accum_steps": 2, "workers": workers}
    assert train(data, tmp_path, "stopped", **settings) == 1
    assert re.search(r"(blue/1|red/7)\.png: is empty; restore or remove the file", capsys.readouterr().err)
    assert train(data, tmp_path, on_bad_image="skip", **settings) == 0
    assert (tmp_path / "run/bad_images.txt").read_text().splitlines() == [str(path) for path in broken]
    assert capsys.readouterr().out.count("skipped 3 images that cannot be read") == 2
    assert train(data, tmp_path, "halves", on_bad_image="skip", stop_epoch=1, **settings) == 0
    assert train(data, tmp_path, "halves", on_bad_image="skip", resume="auto", **settings) == 0
    full, halves = (read_state(tmp_path / name, "state-0002-000000") for name in ("run", "halves"))
    assert_same(halves["state_dict"], full["state_dict"])


def test_a_batch_without_any_image_is_skipped(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", classes=("blue", "red"), train=4)
    for path in data.glob("train/*/[123].png"):
        path.write_bytes(b"")
    # An epoch has eight batches of one image, and two of these images can be read.
    assert train(data, tmp_path, "dry", on_bad_image="skip", batch_size=1, dry_run=True) == 0
    assert train(data, tmp_path, on_bad_image="skip", batch_size=1) == 0
    state = read_state(tmp_path / "run", "state-0002-000000")
    assert state["num_updates"] == 4
    assert state["progress"]["num_bad"] == 0
    assert all(math.isfinite(float(row["train_loss"])) for row in read_summary(tmp_path / "run"))


def update(outcome: Any = "refused", *, loss: float = math.nan, bad_batches: tuple[int, ...] = ()) -> Update:
    return Update(outcome, loss, gradient_norm=math.inf, stop=False, bad_batches=bad_batches, notes=())


class FakeRun:
    """A run with one batch per update, and what its BadSteps logged and saved."""

    def __init__(self, max_in_row: int = 10) -> None:
        self.lines: list[str] = []
        self.saved: list[Progress] = []
        self.progress = Progress(epoch=3)
        self.bad_steps = BadSteps(max_in_row, path_of=lambda index: Path(f"{index}.png"), log=self.lines.append)

    def check(self, *updates: Update, indices: tuple[int, ...] = (1, 2)) -> None:
        for each in updates:
            self.bad_steps.add_batch(torch.tensor(indices))
            self.progress.batch += 1
            self.bad_steps.check(each, self.progress, group_start=self.progress.batch - 1, save=self.saved.append)


def test_a_refused_update_is_logged_with_its_files() -> None:
    run = FakeRun()
    run.check(update(), indices=tuple(range(11)))
    files = ", ".join(f"{number}.png" for number in range(8))
    assert run.lines == [f"refused an update (epoch 3, batch 0): the loss became nan; its images: {files} and 3 more"]
    run.check(update(loss=1.5))
    assert "the loss is 1.5000, but the norm of the gradients became inf; its images: 1.png, 2.png" in run.lines[1]
    assert (run.progress.num_bad, run.progress.bad_in_row) == (2, 2)


def test_only_the_files_of_the_bad_batch_of_a_group_are_named() -> None:
    run = FakeRun()
    for index in range(3):
        run.bad_steps.add_batch(torch.tensor([index]))
    run.bad_steps.check(update(bad_batches=(1,)), run.progress, group_start=0, save=run.saved.append)
    assert run.lines[0].endswith("its images: 1.png")


def test_only_refused_updates_in_a_row_end_the_run() -> None:
    run = FakeRun(max_in_row=3)
    run.check(update(), update(), update("taken", loss=1.0), update(), update("empty"), update("skipped", loss=1.0))
    assert (run.progress.num_bad, run.progress.bad_in_row) == (3, 1)
    run.check(update())
    with pytest.raises(NonFiniteLossError, match=r", refused update number 3 in a row \(--max-bad-steps\)"):
        run.check(update())
    # The progress before the row began.
    assert run.saved == [Progress(epoch=3, batch=3, num_bad=2, bad_in_row=0)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


def poison(patch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Fill the images of the batches with these numbers with NaN."""
    backward = TrainStep.backward
    calls = 0

    def poisoned(self: TrainStep, images: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> None:
        nonlocal calls
        backward(self, images * math.nan if calls in numbers else images, labels, **kwargs)
        calls += 1

    patch.setattr(TrainStep, "backward", poisoned)


def test_a_run_continues_after_a_refused_update_and_counts_it(
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


def test_a_row_of_refused_updates_ends_the_run_with_an_earlier_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, 1, 2)
        assert train(data, tmp_path, max_bad_steps=2, batch_size=4) == 1
    error = capsys.readouterr().err
    assert "error: the loss became nan at epoch 0, batch 2, refused update number 2 in a row" in error
    assert error.count("\n") == 1
    state = read_state(tmp_path / "run", "state-0000-000001")
    assert (state["progress"]["num_bad"], state["progress"]["batch"], state["num_updates"]) == (0, 1, 1)
    assert train(data, tmp_path, batch_size=4, resume="auto") == 0
    assert train(data, tmp_path, "unharmed", batch_size=4) == 0
    resumed, unharmed = (read_state(tmp_path / name, "state-0002-000000") for name in ("run", "unharmed"))
    for part in ("state_dict", "optimizer", "num_updates"):
        assert_same(resumed[part], unharmed[part])
    assert read_summary(tmp_path / "run") == read_summary(tmp_path / "unharmed")


def test_a_row_of_refused_updates_may_span_epochs_and_a_resume(
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


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_split_without_a_readable_image_is_refused_at_the_start(
    split: str, dry_run: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_images(tmp_path / "data", train=3)
    for path in data.glob(f"{split}/*/*.png"):
        path.write_bytes(b"")
    assert train(data, tmp_path, on_bad_image="skip", dry_run=dry_run) == 1
    assert f"{data / split}: none of the 9 images can be read; the first is " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_epoch_without_a_readable_image_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_images(tmp_path / "data")

    def break_images(self: Recorder, epoch: int) -> None:
        for path in data.glob("train/*/*.png") if epoch == 1 else []:
            path.write_bytes(b"")

    monkeypatch.setattr(Recorder, "begin_epoch", break_images)
    assert train(data, tmp_path, on_bad_image="skip") == 1
    assert "none of the training images of epoch 1 can be read" in capsys.readouterr().err
    assert len((tmp_path / "run/bad_images.txt").read_text().splitlines()) == 24
    assert len(read_summary(tmp_path / "run")) == 1


def test_an_epoch_of_refused_updates_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainStep, "_loss_of", lambda self, outputs, images, labels: outputs.mean() * math.nan)
    assert train(make_images(tmp_path / "data"), tmp_path) == 1
    assert "not finite in any update of epoch 0" in capsys.readouterr().err
    assert not (tmp_path / "run/best").exists()
    assert read_state(tmp_path / "run", "state-0000-000000")["progress"]["num_bad"] == 0
