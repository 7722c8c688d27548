"""Quick measurements for the tests of `linvit bench`."""

import pytest

from linvit.measure import timing


@pytest.fixture
def quick_gemm(monkeypatch):
    """Small matrix products to measure the speed of."""
    monkeypatch.setitem(timing.GEMM_SIZES, "cpu", (32,))
