"""Ctrl-C, SIGTERM and SIGUSR1 (SLURM's notice) as a wish to stop, which the loop grants between two steps."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from linvit.training.distributed import sum_over_ranks

# SIGUSR1 is not there on every system.
STOPPING = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if os.name == "posix" else []))


class StopRequest:
    """Which signal asked the run to stop; 0: none."""

    signal_number: int = 0

    @property
    def exit_code(self) -> int:
        """What the shell expects of a process that Ctrl-C (130) or anything else, also in another process, ended."""
        return 128 + (signal.SIGINT if self.signal_number == signal.SIGINT else signal.SIGTERM)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first signal into a request; after it Ctrl-C ends the process as ever, and others change nothing.

    Schedulers repeat themselves while the run still saves: SIGUSR1, then SIGTERM. Outside the main thread, where Python
    lets nobody handle signals, they do what they did before.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        for other in STOPPING[1:]:
            signal.signal(other, signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":
            # Not print, which may itself be what was interrupted.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C stops at once\n")

    before = {number: signal.signal(number, ask) for number in STOPPING}
    try:
        yield request
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


def asked_anywhere(request: StopRequest, device: torch.device) -> bool:
    """Whether any process was asked to stop; all processes call it at the same point and get the same answer."""
    return bool(sum_over_ranks(torch.tensor(float(request.signal_number > 0), device=device)).item())
