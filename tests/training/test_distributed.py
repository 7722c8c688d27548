"""Two processes over gloo."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ddp_runs import RUNS, SETTINGS
from tiny_runs import make_broken_images, make_images, read_state, read_summary, train
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from linvit.distributed import (
    choose_device,
    joined_ranks,
    largest_over_ranks,
    on_primary,
    recorded,
    sum_over_ranks,
    usable_workers,
)
from linvit.evaluation.command import evaluate_command
from linvit.evaluation.options import EvalOptions
from linvit.training import distributed

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
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_broken_images(tmp_path_factory.mktemp("broken"))


def torchrun(port: str, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command += [str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def runs(data: Path, broken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ddp_runs.py has filled."""
    output = tmp_path_factory.mktemp("ddp")
    first, *further = free_ports(len(RUNS))
    done = torchrun(first, "ddp_runs.py", data, broken, output, *further)
    assert done.returncode == 0, done.stderr
    return output


def test_one_process_writes_for_both(runs: Path) -> None:
    assert [row["epoch"] for row in read_summary(runs / "whole")] == ["0", "1"]
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == sorted(RUNS)


def test_no_thread_of_the_group_is_left_when_the_interpreter_ends(runs: Path) -> None:
    for rank in (0, 1):
        names = json.loads((runs / f"threads-{rank}.json").read_text())
        assert names
        assert [name for name in names if "gloo" in name] == []


def test_other_processes_have_a_log_each(runs: Path) -> None:
    assert [path.name for path in (runs / "whole/logs").iterdir()] == ["rank-1.log"]
    lines = (runs / "whole/logs/rank-1.log").read_text().splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("epoch")] == ["epoch 0", "epoch 1"]


def test_two_processes_train_as_one_with_batches_of_both(runs: Path, data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, **SETTINGS | {"batch_size": 8}) == 0
    alone, together = (read_state(run, "state-0002-000000") for run in (tmp_path / "run", runs / "whole"))
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
    names = sorted(path.name for path in (runs / "stopped/checkpoints").iterdir())
    assert names == ["state-0000-000000", "state-0000-000002"]


def test_a_run_of_two_processes_goes_on_with_one_in_the_middle_of_an_epoch(
    runs: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "stopped", tmp_path / "stopped")
    assert train(data, tmp_path, "stopped", resume="auto", **SETTINGS) == 1
    error = capsys.readouterr().err
    assert "at batch 2 of 3 of 8 images each, from 24, but now it would be of 6 of 4 images each, from 24" in error
    assert train(data, tmp_path, "stopped", resume="auto", **SETTINGS | {"batch_size": 8}) == 0
    alone, together = (read_state(run, "state-0002-000000") for run in (tmp_path / "stopped", runs / "whole"))
    for name, weight in alone["state_dict"].items():
        torch.testing.assert_close(together["state_dict"][name], weight, rtol=1e-4, atol=1e-5)


def test_nan_in_one_process_stops_both_before_the_step(runs: Path) -> None:
    statuses = [json.loads((runs / f"statuses-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["whole"] for each in statuses] == [0, 0]
    assert [each["nan"] for each in statuses] == [1, 1]
    assert [path.name for path in (runs / "nan/checkpoints").iterdir()] == ["state-0000-000000"]
    state = read_state(runs / "nan", "state-0000-000000")
    assert all(weight.isfinite().all() for weight in state["state_dict"].values())


def test_memory_that_runs_out_in_one_process_makes_both_go_on_in_parts(runs: Path) -> None:
    halved, whole = (read_state(runs / name, "state-0002-000000") for name in ("memory", "whole"))
    assert (halved["images_at_once"], whole["images_at_once"]) == (2, None)
    for name, weight in whole["state_dict"].items():
        torch.testing.assert_close(halved["state_dict"][name], weight, rtol=1e-4, atol=1e-5)
    lines = (runs / "memory/logs/rank-1.log").read_text().splitlines()
    assert [line for line in lines if "out of memory" in line] == [
        "out of memory with 4 images at once: going on with 2 at a time, in batches as before"
    ]


def test_images_left_out_in_one_process_weigh_as_with_one(runs: Path, broken: Path, tmp_path: Path) -> None:
    assert train(broken, tmp_path, **SETTINGS | RUNS["unreadable"] | {"batch_size": 2}) == 0
    alone, together = (read_state(run, "state-0002-000000") for run in (tmp_path / "run", runs / "unreadable"))
    assert together["num_updates"] == alone["num_updates"]
    for name, weight in alone["state_dict"].items():
        torch.testing.assert_close(together["state_dict"][name], weight, rtol=1e-4, atol=1e-5)
    lists = [(run / "bad_images.txt").read_text() for run in (tmp_path / "run", runs / "unreadable")]
    assert (
        lists[0] == lists[1] == "".join(f"{path}\n" for path in sorted(broken.glob("*/*/*")) if not path.stat().st_size)
    )


def test_a_process_that_fails_ends_the_others_and_has_the_last_word(data: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    done = torchrun(*free_ports(1), "ddp_failure.py", data, tmp_path)
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    assert "error: rank 1: image 7 bites\n" in done.stderr
    assert "[rank1]: Traceback" not in done.stderr
    # torchrun's own report is the end of it.
    cause = done.stderr.split("Root Cause")[1]
    assert "(local_rank: 1)" in cause
    assert "traceback : rank 1: image 7 bites\n" in cause


def test_torchrun_prints_the_traceback_of_a_bug(data: Path, tmp_path: Path) -> None:
    done = torchrun(*free_ports(1), "ddp_failure.py", data, tmp_path, "bug")
    assert done.returncode == 1
    cause = done.stderr.split("Root Cause")[1]
    assert "(local_rank: 1)" in cause
    assert "Traceback (most recent call last)" in cause
    assert "KeyError: 'image 7 bites'" in cause
    assert "in the process of rank 1" in cause


def test_an_error_before_the_processes_have_joined_is_reported_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    monkeypatch.setattr(ErrorHandler, "initialize", lambda self: None)

    @recorded
    def work() -> int:
        with joined_ranks("gpu"):
            return 0

    with pytest.raises(ValueError, match="--device gpu"):
        work()
    assert json.loads(report.read_text())["message"]["message"].startswith("--device gpu is no device")


def test_without_torchrun_an_error_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    enabled: list[bool] = []
    monkeypatch.setattr(ErrorHandler, "initialize", lambda self: enabled.append(True))
    bug = KeyError("bug")

    @recorded
    def work() -> int:
        raise bug

    with pytest.raises(KeyError) as raised:
        work()
    assert raised.value is bug
    assert not enabled
    assert recorded(lambda: 143)() == 143


def failure(error: Exception, monkeypatch: pytest.MonkeyPatch, report: Path) -> Exception:
    """What leaves a command in the second of two processes where `error` is raised."""
    joined = {"device": "cpu", "global_rank": 1, "local_rank": 1, "world_size": 2}
    monkeypatch.setattr(distributed, "init_distributed_device_so", lambda device: joined)
    monkeypatch.setattr(distributed, "SECONDS_TO_SPEAK_LAST", 0.0)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    monkeypatch.setattr(ErrorHandler, "initialize", lambda self: None)

    @recorded
    def work() -> int:
        with joined_ranks("cpu"):
            raise error

    with pytest.raises(Exception) as raised:
        work()
    return raised.value


def test_what_ends_a_process_names_its_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = tmp_path / "error.json"
    for mistake in (ValueError("no such image"), OSError("no such image")):
        found = failure(mistake, monkeypatch, report)
        assert isinstance(found, ValueError)
        assert str(found) == "rank 1: no such image"
        assert json.loads(report.read_text())["message"]["message"] == "rank 1: no such image"
    bug = KeyError("bug")
    assert failure(bug, monkeypatch, report) is bug
    assert bug.__notes__ == ["in the process of rank 1"]
    assert "KeyError: 'bug'" in json.loads(report.read_text())["message"]["message"]


def test_memory_that_runs_out_anywhere_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory ran out where") as raised, joined_ranks("cpu"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    found = failure(torch.OutOfMemoryError("CUDA out of memory."), monkeypatch, tmp_path / "error.json")
    assert str(found) == f"rank 1: {raised.value}"


def test_losing_the_others_is_not_taken_for_the_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    found = failure(lost, monkeypatch, tmp_path / "error.json")
    assert str(found) == "rank 1: another process has failed, and its own message says why"
    assert not (tmp_path / "error.json").exists()


def test_alone_nothing_is_exchanged() -> None:
    values = torch.tensor([1.0, 2.0])
    assert sum_over_ranks(values) is values
    assert on_primary(lambda: 3) == 3
    assert largest_over_ranks(3, torch.device("cpu")) == 3


def test_devices_by_name() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="--device gpu is no device; choose cpu, cuda"):
        choose_device("gpu")


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda:0") == "cuda:0"
    with pytest.raises(ValueError, match="--device cuda:1: the number of GPUs here is 1, and they are counted from"):
        choose_device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        pytest.raises(ValueError, match=r"process 1 of this machine has no GPU of its own, of which there are 1"),
        joined_ranks("auto"),
    ):
        pass


def test_no_more_workers_than_cpus() -> None:
    assert usable_workers(0) == 0
    assert usable_workers(10_000) == os.cpu_count()
