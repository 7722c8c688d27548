"""Quick measurements for the tests of `linvit bench`."""

import pytest

from linvit.bench import peak


@pytest.fixture
def quick_peak(monkeypatch):
    monkeypatch.setitem(peak.SIZES, "cpu", (32,))
