"""What most tests of whole workers begin with: a house for them, and a router that does not give up."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from baton.common.config import RouterConfig
from baton.router import retry
from baton.router.service import Router
from tests.house import House


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who failed a request is asked again soon: what faults do is tried here, not how long a router is cautious."""
    monkeypatch.setattr(retry, "EXCLUSION_S", 0.1)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    yield house
    await house.close()


@pytest.fixture
async def router(house: House) -> AsyncIterator[Router]:
    config = RouterConfig(lease_s=2.0, heartbeat_s=0.1, place_timeout_s=20.0, max_attempts=1000, max_losses=50)
    router = Router("router", config, "secret")
    await router.start(house.members())
    yield router
    await router.close()
