"""The memory of batches is reused only after its release, and worker processes obey only their parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Event

import pytest
import torch

from linvit.data.worker import BufferPool, RawBatch, ignore_outside_signals

SHAPE = (2, 3, 4, 3)


def test_memory_is_reused_once_it_is_released() -> None:
    pool = BufferPool()
    images, in_use = pool.take(SHAPE)
    assert images.shape == SHAPE
    assert images.dtype == torch.uint8
    second, _ = pool.take(SHAPE)
    assert second.data_ptr() != images.data_ptr()
    in_use.zero_()
    third, _ = pool.take(SHAPE)
    assert third.data_ptr() == images.data_ptr()


def test_memory_in_use_is_never_reused() -> None:
    pool = BufferPool()
    held = [pool.take(SHAPE) for _ in range(20)]
    for number, (images, _) in enumerate(held):
        images.fill_(number)
    assert [int(images.float().mean()) for images, _ in held] == list(range(20))
    assert all(in_use.item() == 1 for _, in_use in held)


def test_a_page_locked_copy_releases_its_source_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    pool = BufferPool()
    images, in_use = pool.take(SHAPE)
    batch = RawBatch(images, torch.zeros(2), torch.zeros(2), (), in_use)
    copied = batch.pin_memory()
    later, _ = pool.take(SHAPE)
    assert later.data_ptr() == images.data_ptr()
    # The copy has arrived on the device, but the batch that is now in the memory has not.
    copied.release()
    assert pool.take(SHAPE)[0].data_ptr() != later.data_ptr()


def test_other_shapes_use_different_memory() -> None:
    pool = BufferPool()
    images, in_use = pool.take(SHAPE)
    in_use.zero_()
    other, _ = pool.take((2, 5, 4, 3))
    assert other.shape == (2, 5, 4, 3)
    assert other.data_ptr() != images.data_ptr()
    # The same number of bytes is enough.
    assert pool.take((3, 2, 4, 3))[0].data_ptr() == images.data_ptr()


def wait_for_signals(ready: Event) -> None:
    ignore_outside_signals()
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the sender of a signal")
def test_only_the_parent_ends_a_worker() -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=wait_for_signals, args=(ready,))
    worker.start()
    assert ready.wait(10)
    for name in ("INT", "USR1", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    # Ctrl-C is ignored even from the parent, because a terminal signals the whole group.
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
