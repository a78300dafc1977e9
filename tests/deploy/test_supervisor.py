"""Restarts: the delays, the crash loop, and stopping, with processes that are only pretended."""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from dataclasses import dataclass, field

from baton.common.child import EXIT_CONFIG
from baton.common.clock import ManualClock
from baton.common.config import GatewayConfig
from baton.deploy.launch.launcher import Process, Spec
from baton.deploy.launch.supervisor import FOR_EVER, RestartPolicy, Restarts, Supervisor

SPEC = Spec("gateway", GatewayConfig(model="m", model_name="n"))
AT_ONCE = RestartPolicy(first_delay_s=0.001, max_delay_s=0.001, max_deaths=3)


def test_the_delay_doubles_up_to_its_limit() -> None:
    restarts = Restarts(RestartPolicy())
    now, delays = 0.0, []
    for _ in range(9):
        now += 20.0
        delays.append(restarts.died(now, lived_s=20.0))
    assert delays == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_long_life_is_a_new_beginning() -> None:
    restarts = Restarts(RestartPolicy())
    assert [restarts.died(t, lived_s=20.0) for t in (20, 40, 60)] == [0.5, 1, 2]
    assert restarts.died(200, lived_s=60.0) == 0.5


def test_too_many_deaths_within_the_window_are_a_crash_loop() -> None:
    restarts = Restarts(RestartPolicy(max_deaths=5, window_s=60))
    assert all(restarts.died(t, 1.0) is not None for t in (0, 10, 20, 30))
    assert restarts.died(60.0, 1.0) is None
    restarts = Restarts(RestartPolicy(max_deaths=5, window_s=60))
    assert all(restarts.died(t, 1.0) is not None for t in (0, 16, 32, 48, 64, 80))


def test_one_that_others_go_on_without_is_never_given_up() -> None:
    restarts = Restarts(FOR_EVER)
    assert [restarts.died(t, 0.1) for t in range(8)] == [0.5, 1, 2, 4, 5, 5, 5, 5]


@dataclass
class Pretended:
    """A process that ends when told to, with `on_term` upon SIGTERM (None: it does not heed it)."""

    pid: int
    on_term: int | None = 0
    node: str = ""
    last_lines: deque[str] = field(default_factory=lambda: deque(["last words"]))
    signals: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        return await asyncio.shield(self.exit)

    def terminate(self) -> None:
        self.signals.append("TERM")
        if self.on_term is not None and not self.exit.done():
            self.exit.set_result(self.on_term)

    def kill(self) -> None:
        self.signals.append("KILL")
        if not self.exit.done():
            self.exit.set_result(-signal.SIGKILL)


@dataclass
class Stage:
    """Launcher and listener in one. `codes`: how each start ends at once; then processes that live."""

    codes: list[int] = field(default_factory=list)
    on_term: int | None = 0
    heard: list[str] = field(default_factory=list)
    processes: list[Pretended] = field(default_factory=list)

    async def start(self, spec: Spec) -> Pretended:
        process = Pretended(100 + len(self.processes), self.on_term)
        if self.codes:
            process.exit.set_result(self.codes.pop(0))
        self.processes.append(process)
        return process

    def started(self, spec: Spec, process: Process) -> None:
        self.heard.append(f"started {process.pid}")

    def ended(self, spec: Spec, why: str, delay_s: float) -> None:
        self.heard.append(f"ended {why}")

    def gave_up(self, spec: Spec, why: str, last_lines: tuple[str, ...]) -> None:
        self.heard.append(f"gave up {why} {last_lines}")

    async def until(self, word: str) -> None:
        async with asyncio.timeout(10):
            while not any(h.startswith(word) for h in self.heard):
                await asyncio.sleep(0.001)


async def test_a_process_that_dies_is_started_again_and_stopped_in_the_end() -> None:
    stage = Stage(codes=[1, -signal.SIGSEGV])
    supervisor = Supervisor(SPEC, stage, stage, AT_ONCE, ManualClock())
    supervisor.start()
    await stage.until("started 102")
    await supervisor.stop(10.0, asyncio.Event())
    assert stage.heard == ["started 100", "ended exit code 1", "started 101", "ended killed by SIGSEGV", "started 102"]
    assert stage.processes[-1].signals == ["TERM"]


async def test_a_crash_loop_is_given_up_with_the_last_lines() -> None:
    stage = Stage(codes=[3, 3, 3])
    supervisor = Supervisor(SPEC, stage, stage, AT_ONCE, ManualClock())
    supervisor.start()
    await stage.until("gave up")
    assert stage.heard[-1] == "gave up exit code 3 ('last words',)"
    assert len(stage.processes) == 3
    await supervisor.stop(10.0, asyncio.Event())


async def test_a_wrong_configuration_is_not_tried_twice() -> None:
    stage = Stage(codes=[EXIT_CONFIG])
    supervisor = Supervisor(SPEC, stage, stage, AT_ONCE, ManualClock())
    supervisor.start()
    await stage.until("gave up")
    assert len(stage.processes) == 1
    await supervisor.stop(10.0, asyncio.Event())


async def test_one_that_does_not_heed_sigterm_is_killed() -> None:
    for deadline_s, hurried in ((0.01, False), (60.0, True)):
        stage = Stage(on_term=None)
        supervisor = Supervisor(SPEC, stage, stage, AT_ONCE, ManualClock())
        supervisor.start()
        await stage.until("started")
        hurry = asyncio.Event()
        if hurried:
            hurry.set()
        await supervisor.stop(deadline_s, hurry)
        assert stage.processes[0].signals == ["TERM", "KILL"]
        assert len(stage.processes) == 1


async def test_stopping_does_not_wait_out_a_delay() -> None:
    stage = Stage(codes=[1])
    supervisor = Supervisor(SPEC, stage, stage, RestartPolicy(first_delay_s=3600, max_delay_s=3600), ManualClock())
    supervisor.start()
    await stage.until("ended")
    async with asyncio.timeout(10):
        await supervisor.stop(3600.0, asyncio.Event())
    assert len(stage.processes) == 1


async def test_what_cannot_be_started_says_why() -> None:
    stage = Stage()

    async def start(spec: Spec) -> Pretended:
        raise OSError("no node has a GPU")

    stage.start = start  # type: ignore[method-assign]
    supervisor = Supervisor(SPEC, stage, stage, AT_ONCE, ManualClock())
    supervisor.start()
    await stage.until("gave up")
    assert stage.heard == ["ended cannot start: no node has a GPU"] * 2 + ["gave up cannot start: no node has a GPU ()"]


async def test_stopping_does_not_wait_for_a_start() -> None:
    stage, begun, cleaned = Stage(), asyncio.Event(), asyncio.Event()

    async def start(spec: Spec) -> Pretended:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()
        raise AssertionError

    stage.start = start  # type: ignore[method-assign]
    supervisor = Supervisor(SPEC, stage, stage, AT_ONCE, ManualClock())
    supervisor.start()
    await begun.wait()
    async with asyncio.timeout(10):
        await supervisor.stop(3600.0, asyncio.Event())
    assert cleaned.is_set() and stage.heard == []


async def test_a_launcher_that_breaks_does_not_end_the_supervision() -> None:
    stage, real = Stage(), Stage.start

    async def start(spec: Spec) -> Pretended:
        if not stage.processes:
            process = await real(stage, spec)
            process.exit.set_exception(KeyError("state"))
            return process
        if len(stage.heard) == 2:
            raise RuntimeError("no answer")
        return await real(stage, spec)

    stage.start = start  # type: ignore[method-assign]
    supervisor = Supervisor(SPEC, stage, stage, AT_ONCE, ManualClock())
    supervisor.start()
    await stage.until("started 101")
    assert stage.heard[1:3] == [
        "ended its launcher broke: KeyError('state')",
        "ended its launcher broke: RuntimeError('no answer')",
    ]
    assert stage.processes[0].signals == ["KILL"], "nothing is known of it any more"
    await supervisor.stop(10.0, asyncio.Event())
