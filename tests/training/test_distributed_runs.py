"""Training runs of two processes over gloo."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from ddp_runs import EVAL, PREDICT, RUNS, SETTINGS
from tiny_runs import make_broken_images, make_images, read_state, read_summary, train
from torchrun import free_ports, torchrun

from linvit.cli import main
from linvit.evaluation.command import evaluate_command
from linvit.evaluation.options import EvalOptions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_broken_images(tmp_path_factory.mktemp("broken"))


@pytest.fixture(scope="module")
def runs(data: Path, broken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ddp_runs.py filled."""
    output = tmp_path_factory.mktemp("ddp")
    first, *further = free_ports(len(RUNS) + 2)
    done = torchrun(first, "ddp_runs.py", data, broken, output, *further)
    assert done.returncode == 0, done.stderr
    (output / "stdout.txt").write_text(done.stdout)
    return output


def test_one_process_writes_for_both(runs: Path) -> None:
    assert [row["epoch"] for row in read_summary(runs / "plain")] == ["0", "1"]
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == sorted([*RUNS, "parts"])


def test_no_gloo_thread_is_left_when_the_interpreter_exits(runs: Path) -> None:
    for rank in (0, 1):
        names = json.loads((runs / f"threads-{rank}.json").read_text())
        assert names
        assert [name for name in names if "gloo" in name] == []


def test_every_other_process_writes_a_log(runs: Path) -> None:
    assert [path.name for path in (runs / "plain/logs").iterdir()] == ["rank-1.log"]
    lines = (runs / "plain/logs/rank-1.log").read_text().splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("epoch")] == ["epoch 0", "epoch 1"]


def test_two_processes_train_as_one_with_the_total_batch(runs: Path, data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, **SETTINGS | {"batch_size": 8}) == 0
    alone, together = (read_state(run, "state-0002-000000") for run in (tmp_path / "run", runs / "plain"))
    for name, weight in alone["state_dict"].items():
        torch.testing.assert_close(together["state_dict"][name], weight, rtol=1e-4, atol=1e-5)
    for one, two in zip(alone["progress"]["summary"], together["progress"]["summary"]):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)


def test_two_processes_evaluate_as_one(runs: Path, data: Path, tmp_path: Path) -> None:
    options = {"source": str(runs / "plain"), "data_dir": data, "workers": 0, "json_file": tmp_path / "eval.json"}
    assert evaluate_command(EvalOptions(weights="last", **options)) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    row = read_summary(runs / "plain")[-1]
    assert (found["top1"], found["top5"], found["loss"]) == tuple(
        float(row[column]) for column in ("eval_top1", "eval_top5", "eval_loss")
    )


def test_two_processes_write_the_results_of_one(runs: Path, data: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("eval.json", "eval.csv")}
    command = ["eval", str(runs / "plain"), str(data), *EVAL]
    assert main([*command, "--json", str(files["eval.json"]), "--csv", str(files["eval.csv"])]) == 0
    one, two = (json.loads((folder / "eval.json").read_text()) for folder in (tmp_path, runs))
    for found in (one, two):
        del found["images_per_second"]
    assert one == two
    assert files["eval.csv"].read_bytes() == (runs / "eval.csv").read_bytes()
    assert (runs / "stdout.txt").read_text().count("top-1 %") == 2, "only one process prints the two tables"


def test_two_processes_predict_the_rows_of_one(runs: Path, broken: Path, tmp_path: Path) -> None:
    assert main(["predict", str(runs / "plain"), str(broken / "val"), *PREDICT, "-o", str(tmp_path / "all.jsonl")]) == 0
    parts = sorted((runs / "parts").glob("part-*"))
    assert b"".join(part.read_bytes() for part in parts) == (tmp_path / "all.jsonl").read_bytes()
    assert [len(part.read_text().splitlines()) for part in parts] == [4, 4, 1]
    assert json.loads((runs / "parts/_manifest.json").read_text())["complete"]
    printed = (runs / "stdout.txt").read_text()
    assert printed.count(f"{runs / 'parts'}: predictions on 8 of 9 images\n") == 1, "only one process prints it"


def test_a_stop_request_in_one_process_stops_both_at_the_same_batch(runs: Path) -> None:
    statuses = [json.loads((runs / f"statuses-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["stopped"] for each in statuses] == [143, 143]
    names = sorted(path.name for path in (runs / "stopped/checkpoints").iterdir())
    assert names == ["state-0000-000000", "state-0000-000002"]


def test_a_run_of_two_processes_resumes_with_one_within_an_epoch(
    runs: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "stopped", tmp_path / "stopped")
    assert train(data, tmp_path, "stopped", resume="auto", **SETTINGS) == 1
    error = capsys.readouterr().err
    assert "at batch 2 of 3 batches of 8 from 24 images, but an epoch now has 6 batches of 4 from 24 images" in error
    assert train(data, tmp_path, "stopped", resume="auto", **SETTINGS | {"batch_size": 8}) == 0
    alone, together = (read_state(run, "state-0002-000000") for run in (tmp_path / "stopped", runs / "plain"))
    for name, weight in alone["state_dict"].items():
        torch.testing.assert_close(together["state_dict"][name], weight, rtol=1e-4, atol=1e-5)


def test_nan_in_one_process_stops_both_before_the_step(runs: Path) -> None:
    statuses = [json.loads((runs / f"statuses-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["plain"] for each in statuses] == [0, 0]
    assert [each["nan"] for each in statuses] == [1, 1]
    assert [path.name for path in (runs / "nan/checkpoints").iterdir()] == ["state-0000-000000"]
    state = read_state(runs / "nan", "state-0000-000000")
    assert all(weight.isfinite().all() for weight in state["state_dict"].values())


def test_both_processes_split_batches_if_one_runs_out_of_memory(runs: Path) -> None:
    halved, plain = (read_state(runs / name, "state-0002-000000") for name in ("memory", "plain"))
    assert (halved["images_at_once"], plain["images_at_once"]) == (2, None)
    for name, weight in plain["state_dict"].items():
        torch.testing.assert_close(halved["state_dict"][name], weight, rtol=1e-4, atol=1e-5)
    lines = (runs / "memory/logs/rank-1.log").read_text().splitlines()
    assert [line for line in lines if "out of memory" in line] == [
        "out of memory with 4 images at once: splitting batches into 2 images at a time; the batch size stays the same"
    ]


def test_skipped_images_in_one_process_change_weights_as_in_a_single_process(
    runs: Path, broken: Path, tmp_path: Path
) -> None:
    assert train(broken, tmp_path, **SETTINGS | RUNS["unreadable"] | {"batch_size": 2}) == 0
    alone, together = (read_state(run, "state-0002-000000") for run in (tmp_path / "run", runs / "unreadable"))
    assert together["num_updates"] == alone["num_updates"]
    for name, weight in alone["state_dict"].items():
        torch.testing.assert_close(together["state_dict"][name], weight, rtol=1e-4, atol=1e-5)
    lists = [(run / "bad_images.txt").read_text() for run in (tmp_path / "run", runs / "unreadable")]
    assert (
        lists[0] == lists[1] == "".join(f"{path}\n" for path in sorted(broken.glob("*/*/*")) if not path.stat().st_size)
    )


def test_a_failed_process_ends_the_others_and_its_error_is_reported(data: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    done = torchrun(*free_ports(1), "ddp_failure.py", data, tmp_path)
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    assert "error: rank 1: image 7 bites\n" in done.stderr
    assert "[rank1]: Traceback" not in done.stderr
    # The output ends with torchrun's report.
    cause = done.stderr.split("Root Cause")[1]
    assert "(local_rank: 1)" in cause
    assert "traceback : rank 1: image 7 bites\n" in cause
