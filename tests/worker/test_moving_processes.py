"""Real processes, killed or frozen on purpose in every state of a handover that is not from prefill to decode: of a
running request from one decode worker to another, and of an answer's KV back to a prefill worker. What holds of
`test_processes.py` holds here."""

from __future__ import annotations

import asyncio
import math
import signal

import pytest

from baton.common.types import Role
from tests.toy import oracle
from tests.worker.processes import LEASE_S, Scene, answer, every, prompt, scene, until
from tests.worker.toy_process import MOVING, SOURCE, TARGET, Sick

RUNNING = 4
LENGTH = 40
LATER = 8
"""Of those that come while a frozen one wakes."""
STEP_S = 0.01
"""Slow enough that requests go on while their blocks travel."""
HELD = len(prompt(0)) + 1
"""Tokens of a request that runs and has decoded none: so they wait for each other, and for being told to move."""
ON_THE_WAY = HELD + LENGTH // 2
"""Tokens of a request before one of the workers has struck itself: none ends sooner."""

HANDOVER: dict[str, object] = {"lease_s": LEASE_S, "frame_bytes": 64}

SHARES = [
    *("source: about to ask", "source: in mid-transfer", "source: committing", "source: about to hear of the commit"),
    *("target: asked", "target: reserved", "target: just copied", "target: about to hear of the commit"),
    "target: committed",
]
"""States of a handover for which nobody waits."""


async def _move(point: str, number: int, transport: str) -> None:
    """Requests run on one decode worker; another comes; the first is drained, and one of the two strikes itself."""
    sick = Sick("sick", Role.DECODE, point, number, {**HANDOVER, "transport": transport}, STEP_S, HELD)
    async with scene(sick) as made:
        leaves = await made.admit() if point in SOURCE | MOVING else await made.healthy("decode-0", Role.DECODE)
        await made.healthy("prefill-0", Role.PREFILL)
        await made.ready(2)
        running = asyncio.create_task(made.answers(range(RUNNING), LENGTH))
        await until(leaves, lambda report: report.sequences == RUNNING)
        _ = await made.admit() if point in TARGET else await made.healthy("decode-1", Role.DECODE)
        await made.ready(3)
        made.reach(ON_THE_WAY)
        made.fleet.add(leaves, "leaving")
        await made.process.struck()
        made.reach(math.inf)
        await made.healthy("decode-2", Role.DECODE)
        await _end(made, running)


async def _share(point: str, number: int, transport: str) -> None:
    """Answers go back to prefill when they have ended, and one of the two strikes itself."""
    role, other = (Role.DECODE, Role.PREFILL) if point in SOURCE else (Role.PREFILL, Role.DECODE)
    sick = Sick("sick", role, point, number, {**HANDOVER, "transport": transport})
    async with scene(sick, return_answers=True) as made:
        await made.admit()
        await made.healthy("other", other)
        await made.ready(2)
        running = asyncio.create_task(made.answers(range(RUNNING), LENGTH))
        await made.process.struck()
        await made.healthy("instead", role)
        await _end(made, running)
        for n in range(RUNNING):  # the next turn, on whatever of the first has got into a cache
            said = [*prompt(n), *oracle(prompt(n), LENGTH)]
            await answer(made.router, [*said, 7], 4)


async def _end(made: Scene, running: asyncio.Task[None]) -> None:
    if made.sick.signal == signal.SIGSTOP:
        await made.wakes(range(RUNNING, 2 * RUNNING), LATER)
    await running
    await made.balanced()


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize(("name", "transport"), [("SIGKILL", "shm"), ("SIGSTOP", "tcp")])
async def test_in_every_state_of_a_move(side: str, name: str, transport: str) -> None:
    points = [*SOURCE, *MOVING] if side == "source" else TARGET
    await every(points, lambda point: _move(point, getattr(signal, name), transport), abreast=6)


@pytest.mark.parametrize(("name", "transport"), [("SIGKILL", "tcp"), ("SIGSTOP", "shm")])
async def test_in_states_of_an_answer_that_goes_back(name: str, transport: str) -> None:
    await every(SHARES, lambda point: _share(point, getattr(signal, name), transport), abreast=6)
