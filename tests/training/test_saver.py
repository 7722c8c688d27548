import threading
from collections.abc import Callable

import pytest

from linvit.training import saver as saver_module
from linvit.training.saver import SaveClock, Saver


def failing(error: Exception, times: list[int]) -> Callable[[], None]:
    """Raises while `times` has anything left."""

    def task() -> None:
        if times:
            times.pop()
            raise error

    return task


def test_writing_goes_on_in_the_background_and_a_second_save_waits() -> None:
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


def test_what_fails_is_reported_and_tried_again_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    error = OSError("cannot write best: no space left")
    failures = [1, 1]

    def best() -> None:
        failing(error, failures)()
        done.append("best 1")

    with Saver() as saver:
        saver.save({"last": lambda: done.append("last 1"), "best": best, "state": lambda: done.append("state 1")})
        saver.wait()
        # The state is never ahead of what it counts as written.
        assert done == ["last 1"]
        saver.save({"state": lambda: done.append("state 2")})
        saver.wait()
        assert done == ["last 1"]
        saver.save({"last": lambda: done.append("last 3"), "state": lambda: done.append("state 3")})
        saver.finish()
    # Of a kind the newest alone is written.
    assert done == ["last 1", "best 1", "last 3", "state 3"]
    said = "warning: cannot write best: no space left; training goes on, and the next save tries again\n"
    assert capsys.readouterr().err == said * 2


def test_the_end_tries_once_more_and_then_fails(capsys: pytest.CaptureFixture[str]) -> None:
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
def test_an_error_in_training_waits_for_the_save_but_the_second_ctrl_c_does_not(
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


def test_a_save_is_due_after_so_many_updates_or_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
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
