"""Real processes, killed or frozen on purpose in every state of a handover from prefill to decode: each stream ends
with the oracle's tokens, each of them once, everybody's books balance, and what the frozen one says when it wakes
changes nothing."""

from __future__ import annotations

import asyncio
import signal
from itertools import product

import pytest

from baton.common.types import Role
from tests.toy import FORMAT
from tests.worker.processes import LEASE_S, every, scene
from tests.worker.toy_process import PAIR, PAIR_SOURCE, PAIR_TARGET, SOURCE, STEP, TARGET, Sick

LENGTH = 24

PAIRS = {
    "source": [*PAIR, *PAIR_SOURCE, "source: in mid-transfer", "source: all sent"],
    "target": [*PAIR, *PAIR_TARGET, "target: about to copy", "target: just copied"],
}
"""States in which a process group is not like the other transports."""


async def _case(role: Role, point: str, number: int, transport: str) -> None:
    frame = 4 * FORMAT.block_bytes if point in STEP else FORMAT.block_bytes
    handover: dict[str, object] = {"lease_s": LEASE_S, "frame_bytes": frame, "transport": transport}
    async with scene(Sick("sick", role, point, number, handover)) as made:
        await made.admit()
        await made.healthy("other", Role.DECODE if role is Role.PREFILL else Role.PREFILL)
        await made.ready(2)
        running = asyncio.create_task(made.answers(range(4), LENGTH))
        await made.process.struck()
        await made.healthy("instead", role)
        if number == signal.SIGSTOP:
            await made.wakes(range(4, 8), LENGTH)
        await running
        await made.balanced()


CASES = [
    *product(("source", "target"), ("SIGKILL", "SIGSTOP"), ("shm", "tcp", "process-group")),
    ("target", "SIGSTOP", "grpc"),
]


@pytest.mark.parametrize(("side", "name", "transport"), CASES)
async def test_in_every_state(side: str, name: str, transport: str) -> None:
    role, points = (Role.PREFILL, SOURCE) if side == "source" else (Role.DECODE, TARGET)
    those = PAIRS[side] if transport == "process-group" else list(points)
    if transport == "shm":
        those += [point for point in STEP if point.startswith(side)]
    await every(those, lambda point: _case(role, point, getattr(signal, name), transport), abreast=6)
