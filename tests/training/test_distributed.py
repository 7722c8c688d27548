"""Two processes over gloo."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_runs import SETTINGS
from tiny_runs import make_images, read_state, read_summary, train

from linvit.evaluate import evaluate_command
from linvit.evaluate_options import EvalOptions
from linvit.training.distributed import choose_device, on_primary, sum_over_ranks, usable_workers

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ddp_runs.py has filled."""
    output = tmp_path_factory.mktemp("ddp")
    first, *further = free_ports(3)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", first]
    command += [str(HERE / "ddp_runs.py"), str(data), str(output), *further]
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return output


def test_one_process_writes_for_both(runs: Path) -> None:
    assert [row["epoch"] for row in read_summary(runs / "whole")] == ["0", "1"]
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == ["nan", "stopped", "whole"]


def test_two_processes_train_as_one_with_batches_of_both(runs: Path, data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, **SETTINGS | {"batch_size": 8}) == 0
    alone, together = (read_state(run, "state-0002-000000.pth") for run in (tmp_path / "run", runs / "whole"))
    for name, weight in alone["state_dict"].items():
        torch.testing.assert_close(together["state_dict"][name], weight, rtol=1e-4, atol=1e-5)
    for one, two in zip(alone["progress"]["summary"], together["progress"]["summary"]):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)


def test_two_processes_evaluate_as_one(runs: Path, data: Path, tmp_path: Path) -> None:
    options = {"source": str(runs / "whole"), "data_dir": data, "workers": 0, "json_file": tmp_path / "eval.json"}
    assert evaluate_command(EvalOptions(weights="last", **options)) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    row = read_summary(runs / "whole")[-1]
    assert (found["top1"], found["top5"], found["loss"]) == tuple(
        float(row[column]) for column in ("eval_top1", "eval_top5", "eval_loss")
    )


def test_a_wish_to_stop_in_one_process_stops_both_at_the_same_batch(runs: Path) -> None:
    statuses = [json.loads((runs / f"statuses-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["stopped"] for each in statuses] == [143, 143]
    assert [path.name for path in (runs / "stopped/checkpoints").iterdir()] == ["state-0000-000002.pth"]


def test_nan_in_one_process_stops_both_before_the_step(runs: Path) -> None:
    statuses = [json.loads((runs / f"statuses-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["whole"] for each in statuses] == [0, 0]
    assert [each["nan"] for each in statuses] == [1, 1]
    assert list((runs / "nan/checkpoints").iterdir()) == []


def test_alone_nothing_is_exchanged() -> None:
    values = torch.tensor([1.0, 2.0])
    assert sum_over_ranks(values) is values
    assert on_primary(lambda: 3) == 3


def test_devices_by_name() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="--device gpu is no device; choose cpu, cuda"):
        choose_device("gpu")


def test_no_more_workers_than_cpus() -> None:
    assert usable_workers(0) == 0
    assert usable_workers(10_000) == os.cpu_count()
