"""Whole workers over each transport: the same tokens, and a transport that fails gives way to the next."""

from __future__ import annotations

import pytest
import torch

from baton.common.config import TRANSPORTS
from baton.common.errors import TransportFailed
from baton.common.types import Role
from baton.kvtransfer.link import Greeting
from baton.kvtransfer.process_group import ProcessGroups
from baton.router.service import Router
from baton.worker.assembly import Worker
from tests.house import House
from tests.toy import ToyEngine
from tests.worker.asking import answered

PROMPT = list(range(40, 61))
HERE = ("shm", "tcp", "grpc")
"""What two workers on a CPU have."""


def used(worker: Worker) -> set[str]:
    """Transports by which this worker has sent."""
    return {transport for _, _, transport in worker.plane.outlet._lanes}


def engine() -> ToyEngine:
    """One that can have process groups as well."""
    return ToyEngine(groups=ProcessGroups(torch.device("cpu"), "127.0.0.1", patience=2.0))


@pytest.mark.parametrize("transport", [*HERE, "process-group"])
async def test_each_transport_carries(house: House, router: Router, transport: str) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL, engine())
    await house.worker("decode-0", Role.DECODE, engine(), transport=transport)
    for seed in range(4):
        prompt = [seed, *PROMPT]
        await answered(router, str(seed), prompt, 12)
    await house.balanced()
    assert used(prefill) == {transport}
    assert prefill.loop.load().handovers == 4


async def test_the_best_is_chosen(house: House, router: Router) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL)
    await house.worker("decode-0", Role.DECODE)
    await answered(router, "a", PROMPT, 12)
    assert used(prefill) == {"shm"}


async def test_a_transport_that_fails_gives_way_to_the_next(
    house: House, router: Router, caplog: pytest.LogCaptureFixture
) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL)
    decode = await house.worker("decode-0", Role.DECODE)

    def refuse(*_: object) -> object:
        raise TransportFailed("not today")

    decode.plane._server._takers["shm"] = refuse  # type: ignore[index]
    for seed in range(3):
        prompt = [seed, *PROMPT]
        await answered(router, str(seed), prompt, 12)
    assert "tcp" in used(prefill)
    told = [r for r in caplog.records if "falling back" in r.message]
    assert len(told) == 1 and "not today" in told[0].message
    await house.balanced()


async def test_when_all_have_failed_it_begins_again(house: House, router: Router) -> None:
    await house.worker("prefill-0", Role.PREFILL)
    decode = await house.worker("decode-0", Role.DECODE)
    refusals: list[Greeting] = []

    def admit(greeting: Greeting) -> None:
        if {g.transport for g in refusals} != set(HERE):
            refusals.append(greeting)
            raise TransportFailed("not yet")

    decode.plane._server.admit = admit  # type: ignore[method-assign]
    await answered(router, "a", PROMPT, 12)
    assert list(dict.fromkeys(g.transport for g in refusals)) == list(HERE)
    assert set(HERE) < set(TRANSPORTS)
    await house.balanced()
