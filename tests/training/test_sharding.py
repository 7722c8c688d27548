"""FSDP2 with two processes over gloo: what comes out is what one process makes with the batches of both."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp_runs import RUNS as DDP_RUNS
from ddp_runs import SETTINGS
from fsdp_runs import FSDP, runs
from test_distributed import free_ports, torchrun
from tiny_runs import SETTINGS as TINY
from tiny_runs import assert_same, make_broken_images, make_images, read_state, read_summary, train
from tiny_steps import build_step, random_batch
from torch.distributed.tensor import DTensor, Shard

from linvit.training.config import TrainConfig
from linvit.training.distributed import Ranks
from linvit.training.sharding import shard
from linvit.validation import validate

pytestmark = pytest.mark.slow
ALONE: dict[str, Any] = SETTINGS | FSDP | {"fsdp": False, "batch_size": 8}
END = "state-0002-000000"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_broken_images(tmp_path_factory.mktemp("broken"))


@pytest.fixture(scope="module")
def done(data: Path, broken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that fsdp_runs.py has filled."""
    output = tmp_path_factory.mktemp("fsdp")
    first, *further = free_ports(len(runs(output)))
    process = torchrun(first, "fsdp_runs.py", data, broken, output, *further)
    assert process.returncode == 0, process.stderr
    return output


def assert_near(one: Path, other: Path) -> None:
    """Fail unless two runs ended alike but for the order of sums."""
    a, b = (read_state(run, END) for run in (one, other))
    assert a["optimizer_names"] == b["optimizer_names"]
    for weights in ("state_dict", "state_dict_ema"):
        assert a[weights].keys() == b[weights].keys()
        for name, tensor in a[weights].items():
            torch.testing.assert_close(b[weights][name], tensor, rtol=1e-4, atol=2e-5)
    for mine, theirs in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-6)
    for mine, theirs in zip(read_summary(one), read_summary(other), strict=True):
        assert float(theirs["train_loss"]) == pytest.approx(float(mine["train_loss"]), rel=1e-4)
        assert float(theirs["eval_loss"]) == pytest.approx(float(mine["eval_loss"]), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"), [("whole", {}), ("layerwise", {"share": "layerwise"}), ("compiled", {"clip_grad": None})]
)
def test_divided_it_trains_as_whole(
    name: str, settings: dict[str, Any], done: Path, data: Path, tmp_path: Path
) -> None:
    assert train(data, tmp_path, **ALONE | settings) == 0
    assert_near(tmp_path / "run", done / name)


def test_divided_it_learns_from_a_teacher(done: Path, data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, **runs(done)["taught"] | ALONE) == 0
    assert_near(tmp_path / "run", done / "taught")


def test_images_left_out_weigh_as_with_one_process(done: Path, broken: Path, tmp_path: Path) -> None:
    assert train(broken, tmp_path, **ALONE | DDP_RUNS["unreadable"] | {"batch_size": 2}) == 0
    assert_near(tmp_path / "run", done / "unreadable")


def test_stopping_and_going_on_changes_nothing(done: Path) -> None:
    statuses = [json.loads((done / f"statuses-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(each["stopped"], each["stopped-and-on"]) for each in statuses] == [(143, 0)] * 2
    whole, resumed = (read_state(done / name, END) for name in ("whole", "stopped"))
    for state in (whole, resumed):
        del state["settings"], state["progress"]["summary"]
    assert_same(whole, resumed)
    assert read_summary(done / "whole") == read_summary(done / "stopped")


def test_one_process_goes_on_undivided(done: Path, data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(done / "stopped", tmp_path / "run")
    for later in sorted((run / "checkpoints").glob("state-*"))[2:]:
        shutil.rmtree(later)
    assert train(data, tmp_path, resume="auto", **ALONE) == 0
    assert_near(done / "whole", run)


@pytest.fixture
def single_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_weight_is_divided(single_group: None) -> None:
    step = build_step(model_ema=True)
    ranks = Ranks(torch.device("cpu"), world_size=2)
    shard(step.model, step.plain_model, ema=step.ema, options=step.config, ranks=ranks)
    for weights in step.weights.values():
        for name, parameter in weights.named_parameters():
            assert isinstance(parameter, DTensor), name
            assert parameter.placements == (Shard(0),), name


def test_memory_that_runs_out_is_an_error_rather_than_a_hang(
    single_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = build_step(batch_size=8)
    ranks = Ranks(torch.device("cpu"), world_size=2)
    shard(step.model, step.plain_model, ema=None, options=step.config, ranks=ranks)

    def out_of_memory(images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(step.micro_batches, "forward", out_of_memory)
    with pytest.raises(ValueError, match="memory ran out with 8 images at once while processes exchanged"):
        step.backward(*random_batch(8), group_size=1, closes_group=False)


def test_one_process_alone_has_nothing_to_divide(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path, fsdp=True) == 1
    assert "--fsdp divides the model among processes, but there is only one: use torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"opt": "lamb"}, "fsdp goes with the optimizers adam, adamw, .*, not with lamb"),
        ({"batch_size": "auto"}, "batch_size auto is tried on one process alone"),
        ({"amp": True, "amp_dtype": "float16"}, "fsdp goes with amp_dtype bfloat16"),
        ({"clip_mode": "agc", "clip_grad": 0.1}, "fsdp goes with clip_mode norm or value"),
        ({"model_ema": True, "model_ema_force_cpu": True}, "remove model_ema_force_cpu"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(TrainConfig, TINY | {"fsdp": True} | settings)
