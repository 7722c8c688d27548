"""Signals in worker processes, without the packages that workers of training load."""

import os
import signal
import sys
import threading


def ignore_outside_signals() -> None:
    """Ignore Ctrl-C and SIGUSR1 in this process, and SIGTERM unless its parent sends it.

    Terminals and schedulers signal all processes. The main process decides how to react, and it needs more batches to
    finish its step; without them it would fail before it saves a checkpoint.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name == "posix":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parents_sigterm, daemon=True).start()


def _exit_on_parents_sigterm() -> None:
    while sys.platform == "linux":
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)
