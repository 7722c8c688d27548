"""Ctrl-C and SIGTERM as a wish to stop, which the loop grants between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Which signal asked the run to stop; 0: none."""

    signal_number: int = 0

    @property
    def exit_code(self) -> int:
        """What the shell expects of a process that Ctrl-C (130) or SIGTERM (143, also in another process) ended."""
        return 128 + (self.signal_number or signal.SIGTERM)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request; the second one ends the process as ever."""
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        for caught, handler in before.items():
            signal.signal(caught, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
