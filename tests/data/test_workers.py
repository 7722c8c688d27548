import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Event

import pytest

from linvit.data.worker import obey_parent_alone


def wait(ready: Event) -> None:
    obey_parent_alone()
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the sender of a signal is not known")
def test_a_worker_ends_for_its_parent_alone() -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=wait, args=(ready,))
    worker.start()
    assert ready.wait(10)
    for name in ("INT", "USR1", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    # Ctrl-C comes from the parent too, where a group is signalled.
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
