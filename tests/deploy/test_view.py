"""The cluster as an operator sees it, and the events that follow from what changed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.common.clock import ManualClock
from baton.common.cluster import Phase, ProcessStatus, Traffic, WorkerState, WorkerStatus
from baton.common.messages import Load
from baton.common.types import Role
from baton.deploy.control.desired import Desired, Leaving
from baton.deploy.control.events import KEPT, Events, changes
from baton.deploy.control.reconcile import World
from baton.deploy.control.reports import Reports
from baton.deploy.control.status import WorkerRow
from baton.deploy.control.view import QUIET_S, pool_rows, traffic_row, worker_rows
from tests.deploy.pools import desired

P, D = Role.PREFILL, Role.DECODE


class Scene:
    """Workers of which all run and have reported; their loads count 100 tokens a second."""

    def __init__(self, wanted: Desired) -> None:
        self.wanted = wanted
        self.clock = ManualClock(50.0)
        self.reports = Reports(self.clock, lambda: None)
        self.processes = {
            a.name: ProcessStatus(a.name, Phase.RUNNING, pid=n, node="here", age_s=9.0)
            for n, a in enumerate(wanted.assignments, start=1)
        }

    async def report(self, name: str, **changes: object) -> None:
        load = Load(output_tokens=int(100 * self.clock.now()))
        status = WorkerStatus(name, name.split("-")[0], WorkerState.READY, pid=self.processes[name].pid, load=load)
        await self.reports.report(replace(status, **changes))  # type: ignore[arg-type]

    @property
    def world(self) -> World:
        return World(processes=self.processes, words=self.reports.words(self.processes))

    def row(self, name: str) -> WorkerRow:
        return next(row for row in worker_rows(self.wanted, self.world, self.reports) if row.name == name)


async def test_a_row_for_each_worker_with_what_is_known_of_it() -> None:
    scene = Scene(desired({P: 1, D: 2}))
    assert scene.row("decode-0").state == "starting"
    await scene.report("prefill-0", device="cpu")
    await scene.report("decode-0", state=WorkerState.LOADING, progress=0.5, load=None)
    row = scene.row("prefill-0")
    assert (row.state, row.role, row.node, row.device, row.pid, row.age_s) == (
        "ready",
        "prefill",
        "here",
        "cpu",
        1,
        9.0,
    )
    assert (scene.row("decode-0").state, scene.row("decode-0").progress) == ("loading", 0.5)
    assert [(row.name, row.wanted, row.ready) for row in pool_rows(scene.wanted, scene.world)] == [
        ("prefill", 1, 1),
        ("decode", 2, 0),
    ]


async def test_rates_are_measured_over_reports() -> None:
    scene = Scene(desired())
    for _ in range(4):
        await scene.report("decode-0")
        scene.clock.advance(1.0)
    assert scene.row("decode-0").output_tokens_per_s == pytest.approx(100.0)


async def test_one_that_has_not_reported_for_a_while_is_silent() -> None:
    scene = Scene(desired())
    await scene.report("decode-0")
    scene.clock.advance(QUIET_S + 1)
    assert scene.row("decode-0").state == "silent"
    scene.reports.deaf()
    assert scene.row("decode-0").state == "ready", "it was the controller that did not hear"


async def test_what_the_parent_knows_of_a_dead_one_is_shown() -> None:
    scene = Scene(desired())
    dead = replace(scene.processes["decode-0"], pid=0, why="exit code 1", restarts=2)
    again = "; to try again: baton scale decode=1"
    states = ((Phase.WAITING, "waiting", ""), (Phase.GIVEN_UP, "failed", again), (Phase.STARTING, "starting", ""))
    for phase, state, more in states:
        scene.processes["decode-0"] = replace(dead, phase=phase, last_lines=("no memory",))
        row = scene.row("decode-0")
        assert (row.state, row.detail, row.restarts) == (state, f"exit code 1: no memory{more}", 2)


async def test_who_waits_for_another_one_to_be_ready_says_so() -> None:
    scene = Scene(desired({P: 1, D: 2}))
    for name in ("prefill-0", "decode-1"):
        await scene.report(name)
    scene.wanted = scene.wanted.edit("decode-1", leaving=Leaving.MOVE)
    assert scene.row("decode-1").detail == "to leave as soon as another worker is ready in its place"
    await scene.report("decode-0")
    assert (scene.row("decode-1").state, scene.row("decode-1").detail) == ("leaving", "")


def test_traffic_of_the_last_minute_over_all_gateways() -> None:
    window = Traffic(
        seconds=10.0, arrived=20, prompt_tokens=200, started=20, cached_tokens=50, output_tokens=400, ttft_s=(0.1, 0.3),
        running=3,
    )  # fmt: skip
    row = traffic_row({"gateway-0": [replace(window, arrived=999)] * 3 + [window] * 6, "gateway-1": [window]})
    assert row.requests_per_s == pytest.approx(7 * 20 / 60)
    assert row.output_tokens_per_s == pytest.approx(7 * 400 / 60)
    assert (row.hit_rate, row.running, row.ttft_p50_s, row.ttft_p99_s) == (0.25, 6, 0.3, 0.3)
    assert traffic_row({"gateway-0": []}).requests_per_s == 0


def test_events_are_numbered_and_bounded() -> None:
    clock = ManualClock(5.0)
    events = Events(clock)
    for number in range(KEPT + 3):
        events.add(str(number))
    clock.advance(2.0)
    listed = events.list()
    assert (len(listed), listed[0].number, listed[-1].text, listed[-1].ago_s) == (KEPT, 4, str(KEPT + 2), 2.0)


def test_what_a_person_would_say_of_the_difference() -> None:
    def world(silent: bool = False, word: WorkerStatus | None = None, **changes: object) -> World:
        process = replace(ProcessStatus("w", Phase.RUNNING, pid=4), **changes)  # type: ignore[arg-type]
        words = {} if word is None else {"w": word}
        return World(processes={"w": process}, words=words, silence=frozenset({"w"} if silent else ()))

    nothing, ready = World(processes={}, words={}), WorkerStatus("w", "decode", WorkerState.READY)
    for before, after, says in (
        (nothing, world(node="n1"), [("info", "w runs, process 4 on n1")]),
        (world(), world(age_s=3.0), []),
        (world(), world(pid=5), [("info", "w runs, process 5")]),
        (world(), world(word=ready), [("info", "w is ready, as a decode worker")]),
        (world(word=ready), world(word=replace(ready, load=Load())), []),
        (world(), world(phase=Phase.WAITING, why="exit code 1"),
         [("warning", "w ended (exit code 1) and starts again soon")]),
        (world(), world(phase=Phase.GIVEN_UP, why="exit code 1", last_lines=("oh",)),
         [("error", "w is given up (exit code 1): oh")]),
        (world(), world(silent=True), [("error", "w has been silent for too long, and is killed")]),
        (world(), nothing, [("info", "w has ended")]),
    ):  # fmt: skip
        assert list(changes(before, after)) == says
