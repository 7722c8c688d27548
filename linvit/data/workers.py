"""Which signals end a process that loads images."""

import os
import signal
import sys
import threading


def obey_parent_alone() -> None:
    """Have this process ignore Ctrl-C and SIGUSR1, and SIGTERM unless its parent sends it.

    Terminals and schedulers signal all processes. The main one decides what comes of it, and to finish its step it
    still needs batches: without them it would fail, and save nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name == "posix":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    while sys.platform == "linux":
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)
