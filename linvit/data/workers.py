"""What is particular to a process that loads images: the signals that end it, and its memory."""

import ctypes
import os
import signal
import sys
import threading

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The largest that glibc takes for the second.
_LARGE_BLOCK = 32 * 2**20
_KEPT_MEMORY = 512 * 2**20


def keep_freed_memory() -> None:
    """Have the C library keep the memory of large images for the next ones, where it is glibc.

    It would give it back to the system, and each 4 KiB of what it fetches anew cost a page fault.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
            mallopt(_M_TRIM_THRESHOLD, _KEPT_MEMORY)


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
