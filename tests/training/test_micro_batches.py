"""Batches that do not fit in memory, simulated by a model that raises torch's error above a number of images."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_runs import assert_same
from tiny_steps import build_step, random_batch, weights_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from linvit.training.step import TrainStep


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor) -> Tensor:
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("simulated")


class SmallMemory(nn.Module):
    """A model that runs out of memory above `limit` images, in the forward pass or halfway through the backward."""

    def __init__(self, model: nn.Module, limit: int, where: str) -> None:
        super().__init__()
        self.model, self.limit, self.where = model, limit, where
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        if len(images) <= self.limit:
            return self.model(images)
        if self.where == "forward":
            raise torch.OutOfMemoryError("simulated")
        # The head gets its gradients before the error is raised.
        return self.model.forward_head(_Full.apply(self.model.forward_features(images)))


def limit_memory(step: TrainStep, limit: int, where: str = "forward") -> SmallMemory:
    step.model = SmallMemory(step.model, limit, where)
    return step.model


def run_group(step: TrainStep, images: Tensor, labels: Tensor, batches: int) -> Any:
    for number, (some_images, some_labels) in enumerate(zip(images.chunk(batches), labels.chunk(batches))):
        step.backward(some_images, some_labels, group_size=batches, closes_group=number == batches - 1)
    return step.update()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("limit", [1, 3, 7])
def test_a_split_batch_has_the_loss_and_gradients_of_the_full_batch(where: str, batches: int, limit: int) -> None:
    images, labels = random_batch(8 * batches)
    full, parts = (build_step(batch_size=8, grad_accum_steps=batches, momentum=0.9) for _ in range(2))
    expected = run_group(full, images, labels, batches)
    model = limit_memory(parts, limit, where)
    found = run_group(parts, images, labels, batches)
    assert found.outcome == "taken"
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    for name, weight in weights_of(full).items():
        torch.testing.assert_close(weights_of(parts)[name], weight, rtol=1e-5, atol=1e-6)
    # A size that did not fit is never tried again.
    size = parts.micro_batches.size
    assert size == {1: 1, 3: 2, 7: 4}[limit]
    assert max(model.seen[-8 // size :]) <= size
    tries = [seen for seen in model.seen if seen > limit]
    assert tries == [8, 4, 2][: len(tries)]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_running_out_of_memory_in_a_later_batch_keeps_the_earlier_ones(where: str) -> None:
    images, labels = random_batch(12)
    full, parts = (build_step(batch_size=4, grad_accum_steps=3) for _ in range(2))
    expected = run_group(full, images, labels, 3)
    for number, (some_images, some_labels) in enumerate(zip(images.chunk(3), labels.chunk(3))):
        if number == 1:
            limit_memory(parts, 2, where)
        parts.backward(some_images, some_labels, group_size=3, closes_group=number == 2)
    found = parts.update()
    assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    for name, weight in weights_of(full).items():
        torch.testing.assert_close(weights_of(parts)[name], weight, rtol=1e-5, atol=1e-6)


def test_memory_may_run_out_twice_halfway_through_the_backward_pass_of_a_later_batch() -> None:
    images, labels = random_batch(14)
    full, parts = (build_step(batch_size=7, grad_accum_steps=2) for _ in range(2))
    run_group(full, images, labels, 2)
    parts.backward(images[:7], labels[:7], group_size=2, closes_group=False)
    model = limit_memory(parts, 2, "backward")
    parts.backward(images[7:], labels[7:], group_size=2, closes_group=True)
    # Each failed part is completed before the next one.
    assert model.seen == [7, 4, 2, 2, 2, 1]
    parts.update()
    for name, weight in weights_of(full).items():
        torch.testing.assert_close(weights_of(parts)[name], weight, rtol=1e-5, atol=1e-6)


def test_later_batches_add_to_the_gradients_in_place() -> None:
    step = build_step(grad_accum_steps=3)
    places: list[set[int]] = []
    for parameter in step.parameters:
        parameter.register_post_accumulate_grad_hook(lambda each: places[-1].add(each.grad.data_ptr()))
    for number in range(3):
        places.append(set())
        step.backward(*random_batch(), group_size=3, closes_group=number == 2)
    assert len(places[0]) == len(step.parameters)
    assert places[1] == places[2] == places[0]


def test_running_out_of_memory_does_not_recompile_a_model() -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    images, labels = random_batch(8)
    full, parts = (build_step(batch_size=4, grad_accum_steps=2) for _ in range(2))
    expected = run_group(full, images, labels, 2)
    parts.plain_model.forward_features = torch.compile(parts.plain_model.forward_features, backend=graphs, dynamic=True)
    parts.micro_batches.size = 2
    parts.backward(images[:4], labels[:4], group_size=2, closes_group=False)
    before = graphs.frame_count
    assert before
    parts.micro_batches.size = None
    limit_memory(parts, 2, "backward")
    parts.backward(images[4:], labels[4:], group_size=2, closes_group=True)
    assert parts.micro_batches.size == 2
    assert graphs.frame_count == before
    assert parts.update().gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    for name, weight in weights_of(full).items():
        torch.testing.assert_close(weights_of(parts)[name], weight, rtol=1e-5, atol=1e-6)


def test_an_odd_number_is_halved_upwards() -> None:
    step = build_step(batch_size=6)
    model = limit_memory(step, 2)
    run_group(step, *random_batch(6), 1)
    assert model.seen == [6, 3, 2, 2, 2]


def test_each_split_is_noted_once() -> None:
    step = build_step(batch_size=8)
    limit_memory(step, 2)
    batch = random_batch(8)
    assert run_group(step, *batch, 1).notes == (
        "out of memory with 8 images at once: splitting batches into 4 images at a time; the batch size stays the same",
        "out of memory with 4 images at once: splitting batches into 2 images at a time; the batch size stays the same",
    )
    assert run_group(step, *batch, 1).notes == ()
    step.model.limit = 1
    assert len(run_group(step, *batch, 1).notes) == 1


def test_an_image_that_does_not_fit_alone_is_an_error() -> None:
    step = build_step(batch_size=4)
    limit_memory(step, 0)
    sentence = r"a single image of 16×16 px .* --grad-checkpointing, .*--img-size.*--batch-size"
    with pytest.raises(ValueError, match=sentence):
        run_group(step, *random_batch(4), 1)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_dropout_equals_that_of_a_step_split_from_the_start(where: str) -> None:
    images, labels = random_batch(8)
    halved, split = (build_step(batch_size=8) for _ in range(2))
    split.micro_batches.size = 2
    limit_memory(halved, 2, where)
    for step in (halved, split):
        step.plain_model.head_drop = nn.Dropout(0.5)
        torch.manual_seed(3)
        run_group(step, images, labels, 1)
    assert_same(weights_of(halved), weights_of(split))


def test_mixing_uses_the_full_batch() -> None:
    images, labels = random_batch(8)
    results = []
    for limit in (8, 2):
        step = build_step(batch_size=8, mixup=0.8)
        limit_memory(step, limit)
        np.random.seed(0)
        results.append(run_group(step, images.clone(), labels, 1))
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)


def test_processes_use_the_smallest_size_of_all() -> None:
    parts = build_step().micro_batches
    parts.use_smallest([0, 0])
    assert (parts.size, parts.notes) == (None, [])
    parts.use_smallest([0, 8, 4])
    assert parts.size == 4
    assert parts.notes == ["another process ran out of memory: splitting into 4 images at a time here too"]


@pytest.fixture
def exchanging() -> Iterator[Callable[[TrainStep], None]]:
    """Makes a step exchange its gradients in a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def wrap(step: TrainStep) -> None:
        step.model = step.micro_batches.model = DistributedDataParallel(step.model)

    yield wrap
    dist.destroy_process_group()


def test_a_batch_is_split_before_an_exchange(exchanging: Callable[[TrainStep], None]) -> None:
    images, labels = random_batch(16)
    full, parts = (build_step(batch_size=8, grad_accum_steps=2) for _ in range(2))
    expected = run_group(full, images, labels, 2)
    model = limit_memory(parts, 8)
    exchanging(parts)
    for number, (some_images, some_labels) in enumerate(zip(images.chunk(2), labels.chunk(2))):
        # Memory runs out at the batch whose gradients are exchanged.
        model.limit = 8 - 5 * number
        parts.backward(some_images, some_labels, group_size=2, closes_group=number == 1)
    assert model.seen == [8, 8, 4, 2, 2, 2, 2]
    assert parts.update().gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    for name, weight in weights_of(full).items():
        torch.testing.assert_close(weights_of(parts)[name], weight, rtol=1e-5, atol=1e-6)


def test_running_out_of_memory_during_an_exchange_is_an_error_not_a_hang(
    exchanging: Callable[[TrainStep], None],
) -> None:
    step = build_step(batch_size=8)
    limit_memory(step, 2, "backward")
    exchanging(step)
    with pytest.raises(ValueError, match="memory ran out with 8 images at once while processes exchanged"):
        step.backward(*random_batch(8), group_size=1, closes_group=True)
