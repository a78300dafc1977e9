"""Which GPUs of this machine each worker sees: what Ray does on a cluster, for the local launcher. No torch here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

PLACE_S = 20.0
"""How long a start waits for room. A start that fails counts as a death: so few of them fit into the window of
`supervisor.RestartPolicy` that a worker without room, as in a rollout, is never taken for one that crashes."""
_DIGITS = 6
"""Shares such as a third add up to 1 after so many."""


class Gpus:
    """How much of each GPU is free. Workers that get parts of one share it: who runs them bounds their memory by
    `EngineConfig`, and the driver takes turns between their kernels."""

    def __init__(self, devices: Sequence[str]) -> None:
        """`devices`: as CUDA_VISIBLE_DEVICES names them."""
        self._free = dict.fromkeys(devices, 1.0)
        self._given_back = asyncio.Event()

    async def take(self, ranks: int, share: float) -> tuple[str, ...]:
        """A device of its own for each rank, with so much of it, those that are least used first. Waits for room.
        Raises `OSError` where there is none within `PLACE_S`, at once where there never can be."""
        if ranks > len(self._free):
            raise OSError(f"{ranks} GPUs are wanted, and this machine shows {len(self._free)}")
        try:
            async with asyncio.timeout(PLACE_S):
                while not (found := self._with_room(ranks, share)):
                    self._given_back.clear()
                    await self._given_back.wait()
        except TimeoutError as error:
            free = ", ".join(f"GPU {name} has {free:g} free" for name, free in self._free.items())
            raise OSError(f"no room for {ranks} × {share:g} GPU: {free}") from error
        self._add(found, -share)
        return found

    def give_back(self, devices: Sequence[str], share: float) -> None:
        """What `take` gave."""
        self._add(devices, share)
        self._given_back.set()

    def _with_room(self, ranks: int, share: float) -> tuple[str, ...]:
        """Empty where there is none."""
        roomy = sorted((name for name, free in self._free.items() if free >= share), key=lambda name: -self._free[name])
        return tuple(roomy[:ranks]) if len(roomy) >= ranks else ()

    def _add(self, devices: Sequence[str], share: float) -> None:
        for name in devices:
            self._free[name] = round(self._free[name] + share, _DIGITS)


def installed() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES leaves of this machine's GPUs, or all that the driver shows."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    return tuple(str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*")))
