"""The controller: holds what the cluster shall be, and drives what is to it.

Everything that it decides is pure and elsewhere: edits of the desired state (`desired.py`, `rollout.py`), what follows
from it (`reconcile.py`), the planner. Here is what happens in time. An edit is saved at the parent before anything is
done about it, so this process may die at any moment: the next one loads the state, hears from the parent which
processes there are and from the workers how they are, and goes on; nobody is started again, and no request passes
through here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from ...common.clock import Clock
from ...common.cluster import (
    End,
    Launch,
    LogLines,
    LogQuestion,
    Phase,
    Processes,
    Trace,
    WorkerStatus,
)
from ...common.config import ControllerConfig
from ...common.errors import BatonError, InvalidRequest, NotReady
from ...common.messages import Turn
from ...protos.control import ParentService
from . import rollout
from .autoscale import Autoscaler
from .desired import Desired, anew, drain, gone, load, save, scale, untangle
from .events import Events, changes
from .members import Gateways, GatewayStream
from .reconcile import Action, Forget, TurnWorker, World, members, reconcile, serving, worker_order
from .reports import LIVES, Reports
from .revise import revise
from .status import ClusterStatus
from .turns import Turns
from .view import gateway_rows, pool_rows, traffic_row, worker_rows

ADOPT_S = 3.0
"""How long a controller that has come back waits for workers that live to report, which they do each second, before it
tells gateways who there is."""
PAUSE_S = 5.0
"""If rounds are further apart than this, the controller itself was frozen, and judges nobody by that time."""
SETTLE_S = 1.0
"""How long gateways may take to act on what they have been told."""
RETRY_S = 0.5

log = logging.getLogger(__name__)


class Controller:
    """One cluster. Also a `protos.control.ControllerService`.

    parent   owns the processes and keeps the state
    turn     asks the worker at an address to turn
    stop     ends the whole cluster, in order
    """

    def __init__(
        self,
        config: ControllerConfig,
        parent: ParentService,
        clock: Clock,
        turn: Callable[[str, Turn], Awaitable[None]],
        stop: Callable[[], None],
    ) -> None:
        self._config = config
        self._parent = parent
        self._clock = clock
        self._stop = stop
        self._began = self._last_round = clock.now()
        self._wake = asyncio.Event()
        self._editing = asyncio.Lock()
        self._processes: tuple[Processes, float] | None = None
        self._seen = World(processes={}, words={})
        self._adopted = False
        self._ending = False
        self._complaints: dict[str, str] = {}
        self._patience = rollout.Patience()
        self._desired: Desired | None = None
        self.events = Events(clock)
        self.reports = Reports(clock, self._wake.set)
        self.gateways = Gateways(clock, self._wake.set, version=time.time_ns() >> 20)
        self.autoscaler = Autoscaler()
        self.turns = Turns(turn, self._turned, self._start_anew, self.events, clock)
        self._was_ready = False

    # --- ControllerService -------------------------------------------------------------------------------------------

    async def report(self, status: WorkerStatus) -> None:
        await self.reports.report(status)

    async def attend(self, stream: GatewayStream) -> None:
        await self.gateways.attend(stream)

    # --- what is -----------------------------------------------------------------------------------------------------

    @property
    def desired(self) -> Desired:
        """Raises `BatonError` before it was loaded."""
        if self._desired is None:
            raise BatonError("the controller has not loaded its state yet")
        return self._desired

    def world(self) -> World:
        """What is known now."""
        if self._processes is None:
            return World(processes={}, words={})
        now, (known, at) = self._clock.now(), self._processes
        processes = {p.name: replace(p, age_s=p.age_s + now - at) for p in known.processes}
        words = self.reports.words(processes)
        running = [p for p in processes.values() if p.phase is Phase.RUNNING and p.name in self._workers()]
        world = World(processes=processes, words=words)
        return replace(
            world,
            silence=frozenset(p.name for p in running if self.reports.silence(p, p.age_s) > self._config.silence_s),
            settled=frozenset(
                p.name for p in running if (self.reports.heard_at(p) or 0.0) >= self.gateways.told_at(p.name) + SETTLE_S
            ),
            turning=self.turns.under_way(world.roles()),
        )

    def _workers(self) -> set[str]:
        return {a.name for a in self.desired.assignments}

    # --- in time -----------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Take up what was saved last. Raises `BatonError` if it cannot be had."""
        self._desired = load(await self._parent.load())

    async def run(self) -> None:
        """For ever: follow the parent's processes, and go round."""
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._follow(), name="following the parent")
                both.create_task(self._rounds(), name="rounds")
        finally:
            self.turns.close()

    async def _follow(self) -> None:
        while True:
            try:
                async for processes in self._parent.watch():
                    self._processes = (processes, self._clock.now())
                    self._wake.set()
            except BatonError as error:
                log.warning("the parent does not answer: %s", error)
            await asyncio.sleep(RETRY_S)

    async def _rounds(self) -> None:
        while True:
            self._wake.clear()
            if self._processes is not None:
                await self._round()
            try:
                async with asyncio.timeout(self._config.round_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _round(self) -> None:
        now = self._clock.now()
        if now - self._last_round > PAUSE_S:
            self.reports.deaf()
            self.events.add(f"the controller was away for {now - self._last_round:.0f} s", "warning")
        self._last_round = now
        world = self.world()
        if not self._adopt(world, now):
            return
        for level, text in changes(self._seen, world):
            self.events.add(text, level)
        self._seen = world
        try:
            await self._edit(lambda desired: untangle(desired, world.roles()))
            await self._advance(world, now)
            self.gateways.publish(members(self.desired, world))  # before anything is done: they shall know first
            for action in reconcile(self.desired, world):
                await self._do(action)
            sizes = self.autoscaler.step(self.desired, world, self.gateways.traffic(), now)
            if sizes:
                self.events.add(f"autoscale: {self.autoscaler.why(now)[-1].text}")
                await self._resize(sizes)
        except BatonError as error:
            self._complain("round", str(error))

    def _adopt(self, world: World, now: float) -> bool:
        """Whether it is known who there is: after its start, a controller first listens to those who live."""
        if not self._adopted:
            living = [p for p in world.processes.values() if p.phase in LIVES and p.name in self._workers()]
            if not self.reports.all_heard(living) and now - self._began < ADOPT_S:
                return False
            self._adopted = True
            self._seen = world
            self.events.add("the controller runs" + (f"; workers go on: {len(living)}" if living else ""))
        return True

    async def _advance(self, world: World, now: float) -> None:
        """Take a rollout as far as it goes; take it back where it does not."""
        if self.desired.rollout is None:
            return
        ready = serving(self.desired, world)
        lost = {process.name for process in world.processes.values() if process.phase is Phase.GIVEN_UP}
        await self._edit(lambda desired: rollout.advance(desired, ready, lost))
        if self.desired.rollout is None:
            self.events.add(f"rollout: revision {self.desired.revision} is in place")
            return
        why = self._patience.failure(self.desired, world, ready, now)
        if why and not self.desired.rollout.back:
            self.events.add(f"rollout to revision {self.desired.revision} failed: {why}; going back", "error")
            await self._edit(rollout.abort)

    async def _do(self, action: Action) -> None:
        try:
            match action:
                case Launch() if self._ending:
                    return
                case Launch():
                    await self._parent.launch(action)
                case End():
                    await self._parent.end(action)
                case Forget(name):
                    await self._edit(lambda desired: gone(desired, name))
                case TurnWorker():
                    self.turns.begin(action)
        except NotReady:  # from the parent: it ends everything
            self._ending = True
        except BatonError as error:  # the others are done all the same; this one again in the next round
            self._complain(getattr(action, "name", ""), str(error))

    def _turned(self, action: TurnWorker) -> None:
        self.reports.turned(action.name, action.address, action.role)

    async def _start_anew(self, name: str) -> None:
        try:
            await self._edit(lambda desired: anew(desired, name))
        except BatonError as error:
            self._complain(name, str(error))

    async def _edit(self, change: Callable[[Desired], Desired]) -> None:
        """Save what is changed, and only then let it count. Raises what `change` raises, and what saving does."""
        async with self._editing:
            changed = change(self.desired)
            if changed != self._desired:
                await self._parent.save(save(changed))
                self._desired = changed
                self._wake.set()

    def _complain(self, about: str, text: str) -> None:
        """What goes wrong each round is said once."""
        if self._complaints.get(about) != text:
            self._complaints[about] = text
            self.events.add(f"{about}: {text}", "warning")

    # --- what operators ask for ---------------------------------------------------------------------------------------

    async def scale(self, counts: Mapping[str, int]) -> tuple[str, ...]:
        """See `desired.scale`; what was given up in these pools is tried again. Returns the steps in words."""
        steps = await self._resize(counts)
        processes = self.world().processes
        for worker in self.desired.staying:
            process = processes.get(worker.name)
            if worker.pool in counts and process is not None and process.phase is Phase.GIVEN_UP:
                await self._parent.launch(worker_order(worker))
                steps = (*steps, f"start {worker.name} again")
        for step in steps:
            self.events.add(f"scale: {step}")
        return steps

    async def _resize(self, counts: Mapping[str, int]) -> tuple[str, ...]:
        steps: tuple[str, ...] = ()

        def change(desired: Desired) -> Desired:
            nonlocal steps
            world = self.world()
            held = {name: world.held(name) for name in serving(desired, world)}
            desired, steps = scale(desired, counts, held)
            return desired

        await self._edit(change)
        return steps

    async def drain(self, worker: str, now: bool) -> None:
        """See `desired.drain`."""
        await self._edit(lambda desired: drain(desired, worker, now))
        self.events.add(f"drain: {worker} goes " + ("now, its requests move" if now else "when it is done"))

    async def rollout(self, model: str | None, changes: Mapping[str, Any]) -> None:
        """See `revise` and `rollout.begin`."""
        await self._edit(lambda desired: rollout.begin(desired, revise(desired, model, changes)))
        self.events.add(f"rollout: to revision {self.desired.revision}")

    def down(self) -> None:
        """End the cluster, in order. Said again, it goes on as before: requests that still run are not cut short."""
        if not self._ending:
            self._ending = True
            self.events.add("down: the cluster ends")
            self._stop()

    async def trace(self, request_id: str) -> Trace:
        """What is known of a request; `slowest`: of the slowest recent one. Raises `InvalidRequest`: nothing."""
        trace = await self.gateways.trace("" if request_id == "slowest" else request_id)
        if trace is None:
            what = "any request yet" if request_id == "slowest" else f"a request {request_id!r}"
            raise InvalidRequest(f"no gateway remembers {what}", param="request_id")
        return trace

    async def logs(self, question: LogQuestion) -> LogLines:
        return await self._parent.tail(question)

    def readiness(self) -> str:
        """loading, ready or unhealthy. Ready: requests can be served."""
        world = self.world()
        roles = {self.desired.role(a) for a in self.desired.assignments if a.name in serving(self.desired, world)}
        pair = any(role.prefills for role in roles) and any(role.decodes for role in roles)
        if pair and self.gateways.present:
            self._was_ready = True
            return "ready"
        failed = any(p.phase is Phase.GIVEN_UP for p in world.processes.values())
        return "unhealthy" if failed or self._was_ready else "loading"

    def status(self) -> ClusterStatus:
        """Everything at this moment."""
        now, world = self._clock.now(), self.world()
        return ClusterStatus(
            model=self._config.model_name,
            launcher=self._config.launcher,
            revision=self.desired.revision,
            controller_age_s=now - self._began,
            autoscale=self.desired.autoscale.enabled,
            rollout=rollout.progress(self.desired, serving(self.desired, world)),
            pools=pool_rows(self.desired, world),
            workers=worker_rows(self.desired, world, self.reports),
            gateways=gateway_rows(self.desired, world, self.gateways),
            traffic=traffic_row(self.gateways.traffic()),
            events=self.events.list(),
            why=self.autoscaler.why(now),
        )
