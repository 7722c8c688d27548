"""Errors, exchanged values and stop signals, in one process; tests/training/test_distributed_runs.py starts two."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from linvit import distributed
from linvit.distributed import (
    STOP_SIGNALS,
    PrimaryError,
    joined_ranks,
    largest_over_ranks,
    on_primary,
    record_errors,
    stop_on_signals,
    stop_requested,
    sum_over_ranks,
    usable_workers,
    waiting_group,
)
from linvit.settings.process import UsageError, run


def test_an_error_before_the_processes_join_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    monkeypatch.setattr(ErrorHandler, "initialize", lambda self: None)

    @record_errors
    def work() -> int:
        with joined_ranks("gpu"):
            return 0

    with pytest.raises(ValueError, match="--device gpu"):
        work()
    assert json.loads(report.read_text())["message"]["message"].startswith("--device gpu: unknown device")


def test_without_torchrun_an_error_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    enabled: list[bool] = []
    monkeypatch.setattr(ErrorHandler, "initialize", lambda self: enabled.append(True))
    bug = KeyError("bug")

    @record_errors
    def work() -> int:
        raise bug

    with pytest.raises(KeyError) as raised:
        work()
    assert raised.value is bug
    assert not enabled
    assert record_errors(lambda: 143)() == 143


def failure(error: Exception, monkeypatch: pytest.MonkeyPatch, report: Path) -> Exception:
    """The error that a command raises in the second of two processes, when `error` is raised inside."""
    joined = {"device": "cpu", "global_rank": 1, "local_rank": 1, "world_size": 2}
    monkeypatch.setattr(distributed, "init_distributed_device_so", lambda device: joined)
    monkeypatch.setattr(distributed, "SECONDS_BEFORE_LOST_RANKS", 0.0)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    monkeypatch.setattr(ErrorHandler, "initialize", lambda self: None)

    @record_errors
    def work() -> int:
        with joined_ranks("cpu"):
            raise error

    with pytest.raises(Exception) as raised:
        work()
    return raised.value


def test_an_error_names_the_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = tmp_path / "error.json"
    for mistake in (ValueError("no such image"), OSError("no such image")):
        found = failure(mistake, monkeypatch, report)
        assert isinstance(found, ValueError)
        assert str(found) == "rank 1: no such image"
        assert json.loads(report.read_text())["message"]["message"] == "rank 1: no such image"
        assert found.exit_status == 1
    assert failure(UsageError("no such image"), monkeypatch, report).exit_status == 2
    bug = KeyError("bug")
    assert failure(bug, monkeypatch, report) is bug
    assert bug.__notes__ == ["in the process of rank 1"]
    # What torchrun prints.
    message = json.loads(report.read_text())["message"]
    assert "KeyError: 'bug'" in message["message"]
    assert "Traceback (most recent call last)" in message["extraInfo"]["py_callstack"]
    assert "in the process of rank 1" in message["extraInfo"]["py_callstack"]


def test_out_of_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="memory ran out, and splitting the batch does not help") as raised,
        joined_ranks("cpu"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    found = failure(torch.OutOfMemoryError("CUDA out of memory."), monkeypatch, tmp_path / "error.json")
    assert str(found) == f"rank 1: {raised.value}"


def test_a_lost_connection_is_not_reported_as_the_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    found = failure(lost, monkeypatch, tmp_path / "error.json")
    assert str(found) == "rank 1: another process failed; its own message says why"
    assert not (tmp_path / "error.json").exists()


def test_a_single_process_exchanges_nothing() -> None:
    values = torch.tensor([1.0, 2.0])
    assert sum_over_ranks(values) is values
    assert on_primary(lambda: 3) == 3
    assert largest_over_ranks(3, torch.device("cpu")) == 3
    assert waiting_group() is None


@pytest.mark.parametrize("error", [UsageError("a\x1bb"), OSError("no space")])
def test_only_the_primary_reports_its_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    sent: list[object] = []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "broadcast_object_list", lambda result, group: sent.extend(result))
    status = getattr(error, "exit_status", 1)
    assert run(lambda: on_primary(fail)) == status
    assert capsys.readouterr().err == f"error: {str(error).replace(chr(27), '�')}\n"

    def receive(result: list[object], group: object) -> None:
        result[:] = sent

    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed.dist, "broadcast_object_list", receive)
    assert run(lambda: on_primary(fail)) == status
    assert capsys.readouterr().err == ""
    with pytest.raises(PrimaryError) as raised:
        on_primary(fail)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    assert failure(raised.value, monkeypatch, tmp_path / "error.json") is raised.value
    assert not (tmp_path / "error.json").exists()


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        pytest.raises(ValueError, match=r"process 1 of this machine has no GPU of its own: there are 1"),
        joined_ranks("auto"),
    ):
        pass


def test_there_are_no_more_workers_than_cpus() -> None:
    assert usable_workers(0) == 0
    assert usable_workers(10_000) == os.cpu_count()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_a_signal_requests_a_stop_and_sets_the_exit_status(number: signal.Signals, status: int) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with stop_on_signals() as stop:
        assert not stop_requested(stop, torch.device("cpu"))
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
        assert stop_requested(stop, torch.device("cpu"))
        assert stop.exit_code == status
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_the_second_ctrl_c_stops_at_once(first: signal.Signals) -> None:
    with stop_on_signals():
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_further_signals_of_a_scheduler_are_ignored() -> None:
    with stop_on_signals() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.signal_number == signal.SIGUSR1
        assert stop.exit_code == 143


def test_only_the_first_process_prints_that_it_stops(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with stop_on_signals():
            signal.raise_signal(signal.SIGTERM)
        assert capfd.readouterr().err.count("stopping after this step") == lines
