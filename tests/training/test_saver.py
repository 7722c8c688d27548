"""Saving in the background, and the copies that it writes."""

import threading
from collections.abc import Callable

import pytest
import torch
from tiny_runs import assert_same

from linvit.training import saver as saver_module
from linvit.training.saver import SaveClock, Saver, take_snapshot


def failing(error: Exception, times: list[int]) -> Callable[[], None]:
    """A task that fails once per item of `times`."""

    def task() -> None:
        if times:
            times.pop()
            raise error

    return task


def test_saves_run_in_the_background_and_a_second_one_waits() -> None:
    done: list[str] = []
    may_end = threading.Event()

    def slow() -> None:
        assert may_end.wait(10)
        done.append("first")

    with Saver() as saver:
        saver.save({"state": slow})
        assert done == []
        threading.Timer(0.05, may_end.set).start()
        saver.save({"state": lambda: done.append(f"second after {len(done)}")})
    assert done == ["first", "second after 1"]


def test_a_failed_task_is_reported_and_retried_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    error = OSError("cannot write best: no space left")
    failures = [1, 1]

    def best() -> None:
        failing(error, failures)()
        done.append("best 1")

    with Saver() as saver:
        saver.save({"last": lambda: done.append("last 1"), "best": best, "state": lambda: done.append("state 1")})
        saver.wait()
        # The state waits for the files that it counts as written.
        assert done == ["last 1"]
        saver.save({"state": lambda: done.append("state 2")})
        saver.wait()
        assert done == ["last 1"]
        saver.save({"last": lambda: done.append("last 3"), "state": lambda: done.append("state 3")})
        saver.finish()
    # Of several tasks with one name only the newest runs.
    assert done == ["last 1", "best 1", "last 3", "state 3"]
    warning = "warning: cannot write best: no space left; training continues, and the next save retries\n"
    assert capsys.readouterr().err == warning * 2


def test_finish_retries_once_and_then_fails(capsys: pytest.CaptureFixture[str]) -> None:
    for times, fails in ((1, False), (2, True)):
        with Saver() as saver:
            saver.save({"state": failing(OSError("full"), [1] * times)})
            if fails:
                with pytest.raises(OSError, match="full"):
                    saver.finish()
            else:
                saver.finish()
    assert capsys.readouterr().err.count("\n") == 2


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="a mistake"), Saver() as saver:
        saver.save({"state": failing(RuntimeError("a mistake"), [1])})


@pytest.mark.parametrize(("kind", "waits"), [(ValueError, True), (KeyboardInterrupt, False)])
def test_an_error_in_training_waits_for_the_save_but_a_second_ctrl_c_does_not(
    kind: type[BaseException], waits: bool
) -> None:
    done: list[int] = []
    may_end = threading.Event()

    def slow() -> None:
        assert may_end.wait(10)
        done.append(1)

    def training() -> None:
        with Saver() as saver:
            saver.save({"state": slow})
            if waits:
                threading.Timer(0.05, may_end.set).start()
            raise kind

    with pytest.raises(kind):
        training()
    assert bool(done) == waits
    may_end.set()


def test_a_save_is_due_after_a_number_of_updates_or_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(saver_module.time, "monotonic", lambda: now)
    never = SaveClock(updates=None, minutes=None)
    by_updates, by_time = SaveClock(updates=3, minutes=None), SaveClock(updates=None, minutes=0.5)
    both = SaveClock(updates=3, minutes=0.5)
    due: dict[str, list[int]] = {"updates": [], "time": [], "both": []}
    for update in range(1, 9):
        now += 12.0
        assert not never.is_due()
        for name, clock in (("updates", by_updates), ("time", by_time), ("both", both)):
            if clock.is_due():
                due[name].append(update)
                clock.restart()
    assert due == {"updates": [3, 6], "time": [3, 6], "both": [3, 6]}
    now += 30.0
    assert by_time.is_due()


def test_a_snapshot_does_not_change_with_the_state() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    planes = torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {"weight": weight, "nest": [{"planes": planes, "lr": 0.1}, (1, "two")], "none": None}
    copies = take_snapshot(state, torch.device("cpu"))()
    expected = {
        "weight": weight.detach().clone(),
        "nest": [{"planes": planes.clone(), "lr": 0.1}, (1, "two")],
        "none": None,
    }
    with torch.no_grad():
        weight.add_(1)
        planes.zero_()
    assert_same(copies, expected)
    assert not copies["weight"].requires_grad
    # A resumed optimizer needs the original strides.
    assert copies["nest"][0]["planes"].stride() == planes.stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_later_work_does_not_change_a_snapshot() -> None:
    device = torch.device("cuda")
    weight = torch.zeros(64, 1024, 1024, device=device)
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        busy = busy @ busy
    weight.add_(1)
    snapshot = take_snapshot({"weight": weight}, device)
    for _ in range(20):
        weight.add_(1)
    copy = snapshot()["weight"]
    assert copy.device.type == "cpu"
    assert copy.is_pinned()
    assert torch.equal(copy, torch.ones_like(copy))
