"""FSDP2 with two processes over gloo gives the result of one process with the total batch."""

import copy
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
from safetensors.torch import save_file
from timm import create_model
from timm.models import VisionTransformer
from tiny_runs import SETTINGS as TINY
from tiny_runs import assert_same, make_broken_images, make_images, read_state, read_summary, train
from tiny_steps import build_step, random_batch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torchrun import free_ports, torchrun

from linvit.data.augment.build import resolve_input
from linvit.data.loader import create_eval_loader
from linvit.data.options import InputOptions
from linvit.data.sources.open import open_images
from linvit.distributed import Ranks
from linvit.evaluation import collect
from linvit.evaluation.collect import evaluate
from linvit.evaluation.command import evaluate_command
from linvit.evaluation.metrics import Metrics
from linvit.evaluation.options import EvalOptions
from linvit.settings.fields import validate
from linvit.training.config import TrainConfig
from linvit.training.fsdp import shard

pytestmark = pytest.mark.slow
ALONE: dict[str, Any] = SETTINGS | FSDP | {"fsdp": False, "batch_size": 8}
END = "state-0002-000000"
EVALUATION: dict[str, Any] = {"workers": 0, "device": "cpu", "batch_size": 1, "on_bad_image": "skip"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_broken_images(tmp_path_factory.mktemp("broken"))


@pytest.fixture(scope="module")
def done(data: Path, broken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that fsdp_runs.py filled."""
    output = tmp_path_factory.mktemp("fsdp")
    first, *further = free_ports(len(runs(output)))
    process = torchrun(first, "fsdp_runs.py", data, broken, output, *further)
    assert process.returncode == 0, process.stderr
    return output


def assert_near(one: Path, other: Path) -> None:
    """Fail unless two runs ended alike, up to the order of sums."""
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
    ("name", "settings"), [("plain", {}), ("layerwise", {"share": "layerwise"}), ("compiled", {"clip_grad": None})]
)
def test_a_sharded_model_trains_as_a_full_one(
    name: str, settings: dict[str, Any], done: Path, data: Path, tmp_path: Path
) -> None:
    assert train(data, tmp_path, **ALONE | settings) == 0
    assert_near(tmp_path / "run", done / name)


def test_a_sharded_model_learns_from_a_teacher(done: Path, data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, **runs(done)["taught"] | ALONE) == 0
    assert_near(tmp_path / "run", done / "taught")


def test_skipped_images_change_weights_as_in_one_process(done: Path, broken: Path, tmp_path: Path) -> None:
    assert train(broken, tmp_path, **ALONE | DDP_RUNS["unreadable"] | {"batch_size": 2}) == 0
    assert_near(tmp_path / "run", done / "unreadable")


@pytest.mark.parametrize("name", ["plain", "layerwise", "compiled", "taught", "unreadable"])
def test_sharded_weights_are_evaluated_as_full_ones_to_the_last_digit(
    name: str, done: Path, data: Path, broken: Path, tmp_path: Path
) -> None:
    # The first process evaluates five of the 9 images, in batches of one, and the other four.
    row, state = read_summary(done / name)[-1], read_state(done / name, END)
    images = broken if name == "unreadable" else data
    for prefix, weights in (("eval", "state_dict"), ("eval_ema", "state_dict_ema")):
        full = shutil.copytree(done / name / "last", tmp_path / prefix)
        save_file(state[weights], full / "model.safetensors")
        report = tmp_path / f"{prefix}.json"
        options = EvalOptions(source=f"local-dir:{full}", data_dir=images, json_file=report, **EVALUATION)
        assert evaluate_command(options) == 0
        found = json.loads(report.read_text())
        for figure in ("top1", "top5", "loss"):
            assert float(row[f"{prefix}_{figure}"]) == found[figure], (prefix, figure)


def test_stopping_and_resuming_changes_nothing(done: Path) -> None:
    statuses = [json.loads((done / f"statuses-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(each["stopped"], each["resumed"]) for each in statuses] == [(143, 0)] * 2
    plain, resumed = (read_state(done / name, END) for name in ("plain", "stopped"))
    for state in (plain, resumed):
        del state["settings"], state["progress"]["summary"]
    assert_same(plain, resumed)
    assert read_summary(done / "plain") == read_summary(done / "stopped")


def test_one_process_resumes_without_sharding(done: Path, data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(done / "stopped", tmp_path / "run")
    for later in sorted((run / "checkpoints").glob("state-*"))[2:]:
        shutil.rmtree(later)
    assert train(data, tmp_path, resume="auto", **ALONE) == 0
    assert_near(done / "plain", run)


@pytest.fixture
def single_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_weight_is_sharded(single_group: None) -> None:
    step = build_step(model_ema=True)
    ranks = Ranks(torch.device("cpu"), world_size=2)
    shard(step.model, step.plain_model, ema=step.ema, options=step.config, ranks=ranks)
    for weights in step.weights.values():
        for name, parameter in weights.named_parameters():
            assert isinstance(parameter, DTensor), name
            assert parameter.placements == (Shard(0),), name


def test_running_out_of_memory_is_an_error_not_a_hang(single_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    step = build_step(batch_size=8)
    ranks = Ranks(torch.device("cpu"), world_size=2)
    shard(step.model, step.plain_model, ema=None, options=step.config, ranks=ranks)

    def out_of_memory(images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(step.micro_batches, "forward", out_of_memory)
    with pytest.raises(ValueError, match="memory ran out with 8 images at once while processes exchanged"):
        step.backward(*random_batch(8), group_size=1, closes_group=False)


def test_a_single_process_cannot_shard(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, tmp_path, fsdp=True) == 1
    assert "--fsdp shards the model over processes, but there is only one: use torchrun" in capsys.readouterr().err


def sharded_model(depth: int = 3) -> tuple[VisionTransformer, VisionTransformer]:
    """A model sharded over a single process, and a full copy."""
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=depth, num_heads=2, num_classes=3)
    full = copy.deepcopy(model)
    options = TrainConfig.model_validate(TINY | {"fsdp": True})
    shard(model, model, ema=None, options=options, ranks=Ranks(torch.device("cpu"), world_size=2))
    return model, full


def evaluated(model: nn.Module, data: Path) -> Metrics:
    images = open_images(data, split="val")
    device = torch.device("cpu")
    spec = resolve_input(model, InputOptions())
    return evaluate(model, create_eval_loader(images, spec, batch_size=4, workers=0, device=device), device=device)


def test_evaluation_gathers_one_block_at_a_time(single_group: None, data: Path) -> None:
    model, full = sharded_model()
    most = 0

    def count_gathered(*_: object) -> None:
        nonlocal most
        most = max(most, sum(not isinstance(block.norm1.weight, DTensor) for block in model.blocks))

    for block in model.blocks:
        block.mlp.register_forward_hook(count_gathered)
    assert evaluated(model, data) == evaluated(full, data)
    assert most == 1
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model.training


def test_processes_with_fewer_batches_make_as_many_calls(
    single_group: None, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, full = sharded_model()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    monkeypatch.setattr(collect, "largest_over_ranks", lambda value, device: value + 2)
    assert evaluated(model, data) == evaluated(full, data)
    assert sizes == [4, 4, 1, 1, 1]


def test_running_out_of_memory_in_a_sharded_evaluation_is_an_error(
    single_group: None, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = sharded_model()

    def out_of_memory(images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(model, "forward", out_of_memory)
    sentence = r"evaluating 4 images at once with sharded weights: set a lower --validation-batch-size"
    with pytest.raises(ValueError, match=sentence):
        evaluated(model, data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"opt": "lamb"}, "fsdp does not support opt lamb: choose one of 'adam', 'adamw', "),
        ({"batch_size": "auto"}, "batch_size auto tries batches on an unsharded model"),
        (
            {"amp": True, "amp_dtype": "float16"},
            "fsdp does not support the loss scaler of float16: set amp_dtype to bfloat16",
        ),
        ({"clip_mode": "agc", "clip_grad": 0.1}, "fsdp does not support clip_mode agc"),
        ({"model_ema": True, "model_ema_force_cpu": True}, "remove model_ema_force_cpu"),
    ],
)
def test_options_that_do_not_work_with_fsdp_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(TrainConfig, TINY | {"fsdp": True} | settings)
