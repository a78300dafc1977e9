"""Fleets that most tests of the core begin with."""

from __future__ import annotations

import pytest

from baton.common.types import Role
from tests.router.fakes import Driver


@pytest.fixture
def pair() -> Driver:
    """One prefill and one decode worker."""
    driver = Driver()
    driver.up("p", Role.PREFILL)
    driver.up("d", Role.DECODE)
    return driver


@pytest.fixture
def two_pairs(pair: Driver) -> Driver:
    pair.up("q", Role.PREFILL)
    pair.up("e", Role.DECODE)
    return pair
