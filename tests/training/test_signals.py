import os
import signal

import pytest
import torch

from linvit.distributed import STOPPING, asked_anywhere, stop_on_signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_a_signal_is_a_wish_with_its_exit_status(number: signal.Signals, status: int) -> None:
    before = [signal.getsignal(each) for each in STOPPING]
    with stop_on_signals() as stop:
        assert not asked_anywhere(stop, torch.device("cpu"))
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
        assert asked_anywhere(stop, torch.device("cpu"))
        assert stop.exit_code == status
    assert [signal.getsignal(each) for each in STOPPING] == before


@pytest.mark.parametrize("first", STOPPING)
def test_the_second_ctrl_c_stops_at_once(first: signal.Signals) -> None:
    with stop_on_signals():
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_scheduler_that_repeats_itself_changes_nothing() -> None:
    with stop_on_signals() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.signal_number == signal.SIGUSR1
        assert stop.exit_code == 143


def test_the_first_process_alone_says_that_it_stops(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with stop_on_signals():
            signal.raise_signal(signal.SIGTERM)
        assert capfd.readouterr().err.count("stopping after this step") == lines
