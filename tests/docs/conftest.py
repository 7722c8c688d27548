"""The pages' code runs in this process, and one of them registers a kind of projection."""

import pytest

from linvit.model.projections import PROJECTIONS


@pytest.fixture(autouse=True)
def kinds_of_projection():
    """Leaves the registry as it was."""
    before = dict(PROJECTIONS)
    yield
    PROJECTIONS.clear()
    PROJECTIONS.update(before)
