import pytest
import torch

from linvit.device import choose_device


def test_devices_are_chosen_by_name() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="--device gpu: unknown device; choose 'cpu', 'cuda'"):
        choose_device("gpu")


def test_a_missing_gpu_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda:0") == "cuda:0"
    with pytest.raises(ValueError, match="--device cuda:1: the number of GPUs here is 1, counted from cuda:0"):
        choose_device("cuda:1")
