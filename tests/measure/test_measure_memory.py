"""Extra memory of a step, measured in a subprocess."""

import subprocess

import pytest
import torch
from bench_groups import OURS

from linvit.measure import memory
from linvit.measure.memory import OutOfMemory, StepMemory, can_read_peaks, step_memory_in_subprocess

needs_proc = pytest.mark.skipif(not can_read_peaks(), reason="needs Linux's /proc")


def measure(model=OURS, *, batch_size=1):
    return step_memory_in_subprocess(model, (64, 64), mode="train", batch_size=batch_size, dtype="float32")


@needs_proc
def test_a_steps_extra_memory_is_that_of_its_activations():
    batch_size, tokens, width = 64, 257, 64
    found = measure(batch_size=batch_size)
    activation = batch_size * tokens * width * 4
    # A block stores its input, two norms and at most twice a hidden layer of four widths, plus gradients and workspace.
    assert 4 * activation < found.step_bytes < 40 * activation
    assert found.step_bytes < found.process_bytes


@needs_proc
def test_more_images_take_more_memory():
    few, many = (
        memory.measure_here(OURS, (64, 64), mode="train", batch_size=size, dtype="float32") for size in (8, 64)
    )
    assert 2 * few.step_bytes < many.step_bytes


def finish(monkeypatch, status, stderr):
    done = subprocess.CompletedProcess([], status, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda command, **others: done)


def test_an_error_of_the_subprocess_is_one_sentence(monkeypatch):
    finish(monkeypatch, 2, "a warning\nerror: k is too large\n")
    with pytest.raises(ValueError, match=rf"^measuring the memory of {OURS} failed: k is too large$"):
        measure()
    finish(monkeypatch, 1, "")
    with pytest.raises(ValueError, match="failed: exit status 1"):
        measure()


@pytest.mark.parametrize(
    ("status", "stderr"), [(-9, ""), (1, "error: out of memory\n"), (1, "a warning\nerror: out of memory\n")]
)
def test_a_subprocess_that_runs_out_of_memory_is_recognised(monkeypatch, status, stderr):
    finish(monkeypatch, status, stderr)
    with pytest.raises(OutOfMemory):
        measure()


def test_the_subprocess_reports_out_of_memory(monkeypatch):
    def fail(*arguments, **others):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(memory, "measure_here", fail)
    with pytest.raises(ValueError, match=r"^out of memory$"):
        memory.main([OURS, "64", "64", "train", "1", "float32"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_step_on_a_gpu():
    kept = torch.zeros(1000, device="cuda")
    found = memory.cuda_step_memory(lambda: torch.zeros(2**20, device="cuda"))
    assert found == StepMemory(4 * 2**20, found.process_bytes)
    assert found.process_bytes >= 4 * 2**20 + 4 * kept.numel()
