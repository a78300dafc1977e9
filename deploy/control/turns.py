"""Workers that are asked to turn, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from ...common.clock import Clock
from ...common.errors import BatonError
from ...common.messages import Turn
from ...common.types import Role
from .events import Events
from .reconcile import TurnWorker

WITHIN_S = 60.0
"""How long a worker may take until it holds no request. Those that run there move to others meanwhile."""
PAUSE_S = 1.0
"""How long a worker is not asked again: until it has reported its new role, or after it has refused."""
TRIES = 3
"""A worker that has refused so many times is started anew instead."""


class Turns:
    """ask       puts the question to the worker at an address, and raises what it refuses with
    done         hears of a worker that has turned
    start_anew   gives up on turning a worker
    """

    def __init__(
        self,
        ask: Callable[[str, Turn], Awaitable[None]],
        done: Callable[[TurnWorker], None],
        start_anew: Callable[[str], Awaitable[None]],
        events: Events,
        clock: Clock,
    ) -> None:
        self._ask = ask
        self._done = done
        self._start_anew = start_anew
        self._events = events
        self._clock = clock
        self._asked: dict[str, tuple[TurnWorker, asyncio.Task[None]]] = {}
        self._refusals: dict[str, int] = {}
        self.turned = 0
        self.refused = 0

    def under_way(self, roles: Mapping[str, Role]) -> frozenset[str]:
        """Workers that are not to be asked now, given what each does: they have not answered yet, or have turned and
        not said so yet, or have just refused."""
        asked = self._asked.items()
        return frozenset(n for n, (action, task) in asked if not task.done() or roles.get(n) is not action.role)

    def begin(self, action: TurnWorker) -> None:
        """Ask; returns at once."""
        asking = asyncio.create_task(self._run(action), name=f"turn of {action.name}")
        self._asked[action.name] = action, asking

    def close(self) -> None:
        """Wait for no answer any more."""
        for _, task in self._asked.values():
            task.cancel()

    async def _run(self, action: TurnWorker) -> None:
        name, began = action.name, self._clock.now()
        try:
            await self._ask(action.address, Turn(str(action.role), WITHIN_S))
            self.turned += 1
            self._refusals.pop(name, None)
            self._done(action)
            self._events.add(f"turned {name} to {action.role} in {self._clock.now() - began:.2f} s")
        except BatonError as error:
            await self._refusal(action, error)
        finally:
            asyncio.get_running_loop().call_later(PAUSE_S, self._forget, self._asked[name])

    def _forget(self, asked: tuple[TurnWorker, asyncio.Task[None]]) -> None:
        name = asked[0].name
        if self._asked.get(name) is asked:  # it may have been asked again
            del self._asked[name]

    async def _refusal(self, action: TurnWorker, error: BatonError) -> None:
        name = action.name
        self.refused += 1
        self._refusals[name] = tries = self._refusals.get(name, 0) + 1
        self._events.add(f"{name} does not turn to {action.role}: {error}", "warning")
        if tries >= TRIES:
            del self._refusals[name]
            await self._start_anew(name)
