import pytest
import torch
from tiny_runs import assert_same

from linvit.training.saver import take_snapshot


def test_a_snapshot_stays_as_it_was() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    planes = torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {"weight": weight, "nest": [{"planes": planes, "lr": 0.1}, (1, "two")], "none": None}
    copies = take_snapshot(state, torch.device("cpu"))()
    expected = {
        "weight": weight.detach().clone(),
        "nest": [{"planes": planes.clone(), "lr": 0.1}, (1, "two")],
        "none": None,
    }
    with torch.no_grad():
        weight.add_(1)
        planes.zero_()
    assert_same(copies, expected)
    assert not copies["weight"].requires_grad
    # The optimizer goes on with the strides that it had.
    assert copies["nest"][0]["planes"].stride() == planes.stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_what_is_queued_after_the_snapshot_does_not_change_it() -> None:
    device = torch.device("cuda")
    weight = torch.zeros(64, 1024, 1024, device=device)
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        busy = busy @ busy
    weight.add_(1)
    snapshot = take_snapshot({"weight": weight}, device)
    for _ in range(20):
        weight.add_(1)
    copy = snapshot()["weight"]
    assert copy.device.type == "cpu"
    assert copy.is_pinned()
    assert torch.equal(copy, torch.ones_like(copy))
