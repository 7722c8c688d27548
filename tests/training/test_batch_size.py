"""`--batch-size auto`, on a CPU that simulates a device with memory for a limited number of images."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import assert_same, make_images, read_state, train

from linvit.model.vit import LinformerViT
from linvit.settings.flags import UsageError
from linvit.training import batch_size
from linvit.training.batch_size import find_largest_batch
from linvit.training.config import parse


@pytest.mark.parametrize(
    ("capacity", "limit", "multiple", "expected", "tried"),
    [
        (9, 100, 1, 8, [1, 2, 4, 8, 16, 12]),
        (13, 100, 1, 12, [1, 2, 4, 8, 16, 12]),
        (1000, 100, 1, 100, [1, 2, 4, 8, 16, 32, 64, 100]),
        (1000, 64, 1, 64, [1, 2, 4, 8, 16, 32, 64]),
        (70, 72, 1, 64, [1, 2, 4, 8, 16, 32, 64, 72]),
        (1, 100, 1, 1, [1, 2]),
        (3, 100, 1, 3, [1, 2, 4, 3]),
        (3, 100, 2, 2, [2, 4]),
        (7, 99, 2, 6, [2, 4, 8, 6]),
        (1000, 7, 2, 6, [2, 4, 6]),
    ],
)
def test_the_largest_is_found_by_doubling_and_one_step_between(
    capacity: int, limit: int, multiple: int, expected: int, tried: list[int]
) -> None:
    sizes: list[int] = []

    def fits(size: int) -> bool:
        sizes.append(size)
        return size <= capacity

    assert find_largest_batch(fits, limit=limit, multiple=multiple) == expected
    assert sizes == tried


def test_if_nothing_fits_the_error_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"not even a batch of 2 fits .*--grad-checkpointing.*--img-size"):
        find_largest_batch(lambda size: False, limit=8, multiple=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def memory_of_seven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the CPU raise an out-of-memory error for training on more than seven images at once."""
    forward = LinformerViT.forward

    def limited(self: LinformerViT, images: torch.Tensor, *args: Any) -> torch.Tensor:
        if self.training and len(images) > 7:
            raise torch.OutOfMemoryError("simulated")
        return forward(self, images, *args)

    monkeypatch.setattr(LinformerViT, "forward", limited)
    monkeypatch.setattr(batch_size, "LIMITED_DEVICES", ("cpu",))


@pytest.mark.usefixtures("memory_of_seven")
def test_the_batch_size_is_recorded_and_repeats_the_run(data: Path, tmp_path: Path) -> None:
    settings = {"drop_path": 0.2, "mixup": 0.8, "model_ema": True, "grad_accum_steps": 2}
    assert train(data, tmp_path, batch_size="auto", **settings) == 0
    assert yaml.safe_load((tmp_path / "run/args.yaml").read_text())["batch_size"] == 6
    assert train(data, tmp_path, "again", batch_size=6, **settings) == 0
    found, again = (read_state(tmp_path / name, "state-0002-000000") for name in ("run", "again"))
    for part in ("state_dict", "state_dict_ema", "optimizer", "images_at_once"):
        assert_same(found[part], again[part])
    assert found["images_at_once"] is None


@pytest.mark.usefixtures("memory_of_seven")
@pytest.mark.parametrize("resume", ["auto", "run", "run/checkpoints/state-0001-000000"])
def test_a_resumed_run_keeps_its_batch_size(
    resume: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(data, tmp_path, batch_size=4, stop_epoch=1) == 0
    resume = resume if resume == "auto" else str(tmp_path / resume)
    assert train(data, tmp_path, batch_size="auto", resume=resume) == 0
    assert yaml.safe_load((tmp_path / "run/args.yaml").read_text())["batch_size"] == 4


def test_a_cpu_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, tmp_path, batch_size="auto") == 1
    assert "error: --batch-size auto: on cpu running out of memory ends the process" in capsys.readouterr().err


@pytest.mark.usefixtures("memory_of_seven")
def test_a_batch_that_does_not_fit_is_trained_on_in_parts_and_resumes_to_the_bit(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"drop": 0.1, "mixup": 0.8, "batch_size": 12}
    assert train(data, tmp_path, **settings) == 0
    shown = capsys.readouterr().out
    assert shown.count("out of memory") == 1
    line = (
        "out of memory with 12 images at once: splitting batches into 6 images at a time; the batch size stays the same"
    )
    assert f"{line}\n" in shown
    assert train(data, tmp_path, "halves", stop_epoch=1, **settings) == 0
    capsys.readouterr()
    assert train(data, tmp_path, "halves", resume="auto", **settings) == 0
    assert "out of memory" not in capsys.readouterr().out
    whole, halves = (read_state(tmp_path / name, "state-0002-000000") for name in ("run", "halves"))
    assert whole["images_at_once"] == 6
    for part in ("state_dict", "optimizer", "images_at_once"):
        assert_same(halves[part], whole[part])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_a_batch(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, batch_size="auto", device="cuda") == 0
    # All 24 images fit.
    assert yaml.safe_load((tmp_path / "run/args.yaml").read_text())["batch_size"] == 24


def test_auto_is_parsed_from_the_command_line() -> None:
    assert parse(["D", "-b", "auto"]).batch_size == "auto"
    assert parse(["D", "-b", "6"]).images_per_batch == 6
    with pytest.raises(UsageError, match="--batch-size takes a whole number of at least 1, or auto, not 'many'"):
        parse(["D", "-b", "many"])
    with pytest.raises(
        UsageError, match=r"--batch-size auto tries batches without the teacher.* remove --kd-model-name"
    ):
        parse(["D", "-b", "auto", "--kd-model-name", "run"])
