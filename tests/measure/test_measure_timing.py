"""Models take turns, only their steps are timed, and failures are distinguished."""

import pytest
import timm
import torch

from linvit.measure.timing import (
    GEMM_REPEATS,
    Runner,
    count_flops,
    gemm_flops_per_second,
    interleave,
    is_out_of_memory,
    make_step,
)
from linvit.model.attention import LinformerAttention
from linvit.model.projections import build_projection


class FakeClock:
    """A clock that only steps advance, each by its given seconds."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def runner(self, name, *seconds, error=None):
        durations = iter(seconds)

        def step():
            self.order.append(name)
            duration = next(durations, None)
            if duration is None:
                raise error
            self.now += duration
            return torch.zeros(1)

        return Runner(name, step)

    def run(self, *runners, rounds, warmup=0):
        reports = []
        interleave(runners, rounds=rounds, warmup=warmup, clock=lambda: self.now, report=reports.append)
        return reports


def test_every_round_times_every_model_once_in_turn():
    clock = FakeClock()
    a, b = clock.runner("a", 9.0, 1.0, 2.0), clock.runner("b", 8.0, 3.0, 5.0)
    assert clock.run(a, b, rounds=2, warmup=1) == [0, 1]
    assert clock.order == ["a", "b"] * 3
    assert (a.seconds, b.seconds) == ([1.0, 2.0], [3.0, 5.0])


def test_without_warmup_the_first_step_counts():
    clock = FakeClock()
    a = clock.runner("a", 9.0)
    clock.run(a, rounds=1)
    assert a.seconds == [9.0]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("x: can't allocate memory: y"), MemoryError()]
)
def test_a_model_that_runs_out_of_memory_is_skipped(error):
    clock = FakeClock()
    a, b = clock.runner("a", 1.0, error=error), clock.runner("b", 2.0, 3.0, 4.0)
    clock.run(a, b, rounds=3)
    assert a.is_out_of_memory
    assert clock.order == ["a", "b", "a", "b", "b"]
    assert (a.seconds, b.seconds) == ([1.0], [2.0, 3.0, 4.0])


def test_other_failures_name_the_model():
    clock = FakeClock()
    with pytest.raises(ValueError, match=r"^ours fails: shapes do not fit$"):
        clock.run(clock.runner("ours", error=RuntimeError("shapes do not fit\nand more")), rounds=1)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_outputs_that_are_not_finite_are_not_timed():
    runner = Runner("ours", lambda: torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="ours gives outputs that are not finite"):
        interleave([runner], rounds=1, warmup=1, clock=float, report=lambda index: None)
    assert runner.seconds == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_runs_its_mode_and_leaves_no_gradients(dtype):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    images = torch.randn(2, 3, 2, 2)
    logits = make_step(model, images, mode="forward", dtype=dtype)()
    assert (logits.dtype, logits.requires_grad, model.training) == (dtype, False, False)
    gradients = []
    model[1].weight.register_post_accumulate_grad_hook(lambda weight: gradients.append(weight.grad.clone()))
    logits = make_step(model, images, mode="train", dtype=dtype)()
    assert (logits.dtype, logits.requires_grad, model.training) == (dtype, False, True)
    torch.testing.assert_close(gradients[0], images.flatten(1).sum(0).expand(5, -1), rtol=0.02, atol=0.02)
    assert model[1].weight.grad is None


B, D, P, SIZE, CLASSES = 2, 64, 8, 32, 10
T = (SIZE // P) ** 2 + 1


def vit(depth):
    with torch.device("meta"):
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=SIZE, patch_size=P, embed_dim=D, num_heads=2, depth=depth, num_classes=10
        )


@pytest.mark.parametrize("depth", [1, 2])
def test_a_transformer_counts_as_by_hand(depth):
    images = torch.empty(B, 3, SIZE, SIZE, device="meta")
    patch_embedding = 2 * B * (T - 1) * D * 3 * P * P
    block = 2 * B * T * D * 3 * D + 2 * 2 * B * T * T * D + 2 * B * T * D * D + 2 * 2 * B * T * D * 4 * D
    forward = patch_embedding + depth * block + 2 * B * D * CLASSES
    assert count_flops(vit(depth), images, mode="forward") == forward
    # Each product has two gradients, except that the images need none.
    assert count_flops(vit(depth), images, mode="train") == 3 * forward - patch_embedding


def test_linformer_attention_counts_as_by_hand():
    N, k = 256, 4
    with torch.device("meta"):
        layer = LinformerAttention(
            D, 2, qkv_bias=True, key_projection=build_projection("linear", k=k, grid_size=(16, 16))
        )
        layer.order = "associative"
        x = torch.empty(1, N, D)
    projecting, keys_and_values = 2 * k * N * D, 2 * 2 * k * D * D
    attention = 2 * N * D * D + 2 * 2 * N * k * D + 2 * N * D * D
    by_hand = projecting + keys_and_values + attention
    # The row sums of E, for the bias, come on top.
    assert by_hand <= count_flops(layer, x, mode="forward") <= by_hand + 2 * 2 * k * N


def test_the_fastest_product_counts(monkeypatch):
    monkeypatch.setattr("linvit.measure.timing.GEMM_SIZES", {"cpu": (32,)})
    durations = [5.0, 2.0, 4.0, 3.0, 6.0]
    assert len(durations) == GEMM_REPEATS
    times = iter([time for start, taken in enumerate(durations) for time in (start * 10.0, start * 10.0 + taken)])
    found = gemm_flops_per_second(torch.bfloat16, torch.device("cpu"), clock=lambda: next(times))
    assert found == 2 * 32**3 / 2.0
