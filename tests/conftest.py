"""What all tests share."""

import os

import pytest
import torch

# Tests must see what a user sees who is offline.
os.environ["HF_HUB_OFFLINE"] = "1"

# Some tests fork, and after torch.export autograd can only be used in forked processes if it was used before.
torch.zeros(1, requires_grad=True).sum().backward()

# Test processes side by side share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slow tests, so that the processes of pytest-xdist end at the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
