"""Owns all processes of a cluster and keeps them running: what the parent answers over gRPC. It does not know what a
cluster is; that it is told, process by process, by the controller, which may die and come back meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace

from ...common.clock import Clock
from ...common.cluster import End, Launch, LogLines, LogQuestion, Phase, Processes, ProcessStatus
from ...common.errors import Conflict, InvalidRequest, NotReady
from ...common.json_form import from_json
from .launcher import KINDS, Launcher, Process, Resources, Spec
from .logs import LogTails
from .supervisor import RestartPolicy, Supervisor


@dataclass(slots=True)
class _Kept:
    """`since`: when it was started last. `hurry`: it shall not take its time to end any more."""

    order: Launch
    status: ProcessStatus
    supervisor: Supervisor
    since: float = 0.0
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    ending: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class Loss:
    """A process that was given up, in words for people."""

    name: str
    kind: str
    why: str
    last_lines: tuple[str, ...]

    def __str__(self) -> str:
        last = f": {self.last_lines[-1]}" if self.last_lines else ""
        return f"{self.name} cannot be kept running ({self.why}){last}"


class Keeper:
    """Implements `protos.control.ParentService`.

    launchers   by kind of process; `""` for all other kinds
    note        gets what people should know, one line each
    lost        hears of processes that were given up
    saved       what `load` answers before anything was saved. What is saved stays in memory: it has to outlive the
                controller, and no process of the cluster outlives this one
    """

    def __init__(
        self,
        launchers: Mapping[str, Launcher],
        logs: LogTails,
        policy: RestartPolicy,
        clock: Clock,
        note: Callable[[str], None],
        lost: Callable[[Loss], None],
        saved: bytes = b"",
    ) -> None:
        self._launchers = launchers
        self._logs = logs
        self._policy = policy
        self._clock = clock
        self._note = note
        self._lost = lost
        self._saved = saved
        self._kept: dict[str, _Kept] = {}
        self._version = 0
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def processes(self) -> Processes:
        """What is kept now. Ages are of this moment."""
        now = self._clock.now()
        rows = (replace(k.status, age_s=now - k.since if k.status.pid else 0.0) for k in self._kept.values())
        return Processes(self._version, tuple(rows))

    def has_any(self, kind: str) -> bool:
        """Whether a process of this kind is left that was not given up."""
        return any(k.order.kind == kind and k.status.phase is not Phase.GIVEN_UP for k in self._kept.values())

    # --- ParentService -----------------------------------------------------------------------------------------------

    async def launch(self, order: Launch) -> None:
        """Keep this process running. Nothing happens where it runs with the same digest. Raises `Conflict` where
        another one of its name lives, `NotReady` where everything is about to end, `InvalidRequest` where the order
        makes no sense."""
        if self._closed:
            raise NotReady("the cluster is ending")
        kept = self._kept.get(order.name)
        if kept is not None and kept.status.phase is not Phase.GIVEN_UP:
            if kept.ending is None and kept.order.digest == order.digest:
                return
            raise Conflict(f"{order.name} is still there, with another configuration or about to end: end it first")
        if order.kind not in KINDS:
            raise InvalidRequest(f"no such kind of process: {order.kind}")
        config, resources = from_json(order.config, KINDS[order.kind]), from_json(order.resources, Resources)
        launcher = self._launchers.get(order.kind, self._launchers[""])
        supervisor = Supervisor(
            Spec(order.name, config, order.threads, resources), launcher, self, self._policy, self._clock
        )
        status = ProcessStatus(order.name, Phase.STARTING, order.digest)
        self._kept[order.name] = _Kept(order, status, supervisor)
        self._announce()
        supervisor.start()

    async def end(self, order: End) -> None:
        """End it for good. Said again with less time, that counts."""
        kept = self._kept.get(order.name)
        if kept is None:
            return
        if kept.ending is None:
            kept.status = replace(kept.status, phase=Phase.ENDING)
            kept.ending = asyncio.create_task(self._end(kept, order.within_s), name=f"end of {order.name}")
            self._announce()
        else:
            asyncio.get_running_loop().call_later(order.within_s, kept.hurry.set)

    async def watch(self) -> AsyncIterator[Processes]:
        """What there is, then again after each change, for ever."""
        seen = -1
        while True:
            changed = self._changed
            if self._version == seen:
                await changed.wait()
            processes = self.processes
            seen = processes.version
            yield processes

    async def tail(self, question: LogQuestion) -> LogLines:
        return self._logs.tail(question)

    async def save(self, data: bytes) -> None:
        self._saved = data

    async def load(self) -> bytes:
        return self._saved

    # --- Listener of the supervisors ---------------------------------------------------------------------------------

    def started(self, spec: Spec, process: Process) -> None:
        kept = self._kept[spec.name]
        phase = kept.status.phase if kept.ending else Phase.RUNNING
        kept.since = self._clock.now()
        kept.status = replace(kept.status, phase=phase, pid=process.pid, node=process.node)
        self._announce()

    def ended(self, spec: Spec, why: str, delay_s: float) -> None:
        kept = self._kept[spec.name]
        restarts = kept.status.restarts + 1
        kept.status = replace(kept.status, phase=Phase.WAITING, pid=0, restarts=restarts, why=why)
        self._note(f"{spec.name} ended ({why}); starting it again in {delay_s:g} s")
        self._announce()

    def gave_up(self, spec: Spec, why: str, last_lines: tuple[str, ...]) -> None:
        kept = self._kept[spec.name]
        kept.status = replace(kept.status, phase=Phase.GIVEN_UP, pid=0, why=why, last_lines=last_lines)
        self._announce()
        self._lost(Loss(spec.name, kept.order.kind, why, last_lines))

    # -----------------------------------------------------------------------------------------------------------------

    async def close(self, kind: str, within_s: float) -> None:
        """Launch nothing any more, and end all processes of this kind, in order or, after `hurry`, at once."""
        self._closed = True
        ends = [kept for kept in self._kept.values() if kept.order.kind == kind]
        for kept in ends:
            await self.end(End(kept.order.name, within_s))
        await asyncio.gather(*(kept.ending for kept in ends if kept.ending is not None))

    def hurry(self) -> None:
        """Whoever is to end, or will be, does so at once."""
        for kept in self._kept.values():
            kept.hurry.set()

    async def _end(self, kept: _Kept, within_s: float) -> None:
        await kept.supervisor.stop(within_s, kept.hurry)
        if self._kept.get(kept.order.name) is kept:
            del self._kept[kept.order.name]
        self._announce()

    def _announce(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()
