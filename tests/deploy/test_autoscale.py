"""Where the planner meets the cluster: pools and their limits, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.common.cluster import Phase, ProcessStatus, WorkerState, WorkerStatus
from baton.common.types import Role
from baton.deploy.control import autoscale, planner
from baton.deploy.control.observation import Observation
from baton.deploy.control.planner import AutoscaleConfig
from baton.deploy.control.reconcile import World
from tests.deploy.pools import desired, pool
from tests.deploy.rig import Household, Rig
from tests.deploy.stage import until

P, D = Role.PREFILL, Role.DECODE


def test_what_the_planner_wants_is_spread_over_pools_within_their_limits() -> None:
    wanted = replace(desired(), pools=(pool(P), replace(pool(D), max=2), replace(pool(D), name="more", max=3)))
    assert autoscale.spread(wanted, D, 3) == {"decode": 2, "more": 2}
    assert autoscale.spread(wanted, D, 9) == {"decode": 2, "more": 3}
    assert autoscale.spread(wanted, D, 0) == {}
    assert autoscale.spread(wanted, D, -1) == {"decode": 0}
    assert autoscale.spread(wanted, P, 1) == {"prefill": 2}


async def test_the_planner_is_asked_at_its_interval_and_says_why() -> None:
    wanted = replace(desired(), autoscale=AutoscaleConfig(enabled=True, interval_s=5.0))
    rig = Rig(Household(wanted))
    async with rig.controller() as controller:
        await rig.up(controller)
        rig.clock.advance(1.0)
        await until(lambda: bool(controller.status().why))
        (line,) = controller.status().why
        assert line.text
        assert controller.status().autoscale


@pytest.mark.parametrize(
    ("limits", "more", "sizes"),
    [
        ({}, 1, {"prefill": 2, "decode": 2}),
        ({"prefill": {"max": 1}}, 1, {}),
        ({"decode": {"min": 2}}, 2, {"prefill": 2, "decode": 2}),
        ({"prefill": {"min": 1}}, -1, {}),
    ],
)
def test_a_worker_turns_only_where_both_sides_limits_allow_it(
    limits: dict[str, dict[str, int]], more: int, sizes: dict[str, int]
) -> None:
    wanted = desired({P: 1, D: 3})
    wanted = replace(wanted, pools=tuple(replace(p, **limits.get(p.name, {})) for p in wanted.pools))  # type: ignore[arg-type]
    assert autoscale.fit(wanted, more, -more) == sizes


def test_what_limits_forbid_is_said_and_does_not_count_as_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = desired({P: 1, D: 2})
    pools = (replace(wanted.pools[0], max=1), wanted.pools[1])
    wanted = replace(wanted, pools=pools, autoscale=AutoscaleConfig(enabled=True))
    decision = planner.Decision(1, -1, "turn 1 decode to prefill: prefill needs 2.0 of 1", changes=True)
    monkeypatch.setattr(planner, "plan", lambda seen, memory, config: (decision, memory))
    scaler = autoscale.Autoscaler()
    assert scaler.step(wanted, World(processes={}, words={}), {}, now=10.0) == {}
    assert scaler.decisions == 0
    assert scaler.why(10.0)[-1].text == f"{decision.why}; but min and max of the pools forbid it"


def test_a_worker_that_finds_no_room_keeps_the_others_from_turning_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, int]] = []

    def plan(
        seen: Observation, memory: planner.Memory, config: AutoscaleConfig
    ) -> tuple[planner.Decision, planner.Memory]:
        asked.append((seen.changing, config.max_workers))
        return planner.Decision(1, 1, "stay"), memory

    monkeypatch.setattr(planner, "plan", plan)
    wanted = replace(desired(), autoscale=AutoscaleConfig(enabled=True, max_workers=8))
    processes = {n: ProcessStatus(n, Phase.RUNNING, pid=1) for n in ("prefill-0", "decode-0")}
    words = {n: WorkerStatus(n, n[:-2], WorkerState.READY) for n in processes}
    up, waits = (
        World(processes=processes, words=words),
        World(processes=processes, words={"decode-0": words["decode-0"]}),
    )
    scaler = autoscale.Autoscaler()
    for world, now in ((up, 10.0), (waits, 20.0), (waits, 20.0 + autoscale.PATIENCE_S + 1), (up, 99.0)):
        scaler.step(wanted, world, {}, now)
    assert asked == [("", 8), ("prefill-0 is not ready yet", 8), ("", 0), ("", 8)]
