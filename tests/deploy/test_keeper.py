"""The keeper of processes: what it is told, what it tells, and what it keeps for the controller."""

from __future__ import annotations

import asyncio

import pytest

from baton.common.child import EXIT_CONFIG
from baton.common.clock import RealClock
from baton.common.cluster import End, Launch, LogQuestion, Phase, ProcessStatus
from baton.common.config import GatewayConfig
from baton.common.errors import Conflict, InvalidRequest, NotReady
from baton.deploy.control.desired import launch_order
from baton.deploy.launch.keeper import Keeper, Loss
from baton.deploy.launch.launcher import Resources
from baton.deploy.launch.logs import KEPT_LINES, LogTails
from baton.deploy.launch.supervisor import RestartPolicy
from baton.protos.control import ParentClient, parent_handlers
from baton.protos.rpc import Peer, listen, make_server
from tests.deploy.stage import Stage, until


def order(name: str = "gateway-0", port: int = 1) -> Launch:
    return launch_order(name, GatewayConfig(model="m", model_name="n", port=port), Resources())


class House:
    """A keeper over a stage, and what it said."""

    def __init__(self, **fails: int) -> None:
        self.stage = Stage(fails={name.replace("_", "-"): code for name, code in fails.items()})
        self.notes: list[str] = []
        self.losses: list[Loss] = []
        self.logs = LogTails(lambda name, line: None)
        policy = RestartPolicy(first_delay_s=0.01, max_delay_s=0.01, max_deaths=3)
        clock = RealClock()
        self.keeper = Keeper(
            {"": self.stage}, self.logs, policy, clock, self.notes.append, self.losses.append, b"first"
        )

    def row(self, name: str = "gateway-0") -> ProcessStatus:
        return next(p for p in self.keeper.processes.processes if p.name == name)

    def is_there(self, phase: Phase) -> bool:
        return [p.phase for p in self.keeper.processes.processes] == [phase]


async def test_a_process_is_launched_once_however_often_it_is_asked_for() -> None:
    house = House()
    await house.keeper.launch(order())
    await house.keeper.launch(order())
    await until(lambda: house.is_there(Phase.RUNNING))
    await house.keeper.launch(order())
    assert house.stage.starts == ["gateway-0"]
    row = house.row()
    assert (row.pid, row.config, row.restarts) == (1001, order().digest, 0)
    with pytest.raises(Conflict, match="gateway-0 is still there"):
        await house.keeper.launch(order(port=2))


async def test_one_that_dies_is_started_again_by_itself() -> None:
    house = House()
    await house.keeper.launch(order())
    await until(lambda: house.is_there(Phase.RUNNING))
    house.stage.live["gateway-0"].end(1)
    await until(lambda: house.is_there(Phase.RUNNING) and house.row().restarts == 1)
    assert house.row().why == "exit code 1"
    assert house.notes == ["gateway-0 ended (exit code 1); starting it again in 0.01 s"]


@pytest.mark.parametrize(("code", "starts"), [(1, 3), (EXIT_CONFIG, 1)])
async def test_a_crash_loop_is_given_up_with_its_last_lines_until_it_is_launched_anew(code: int, starts: int) -> None:
    house = House(gateway_0=code)
    await house.keeper.launch(order())
    await until(lambda: house.is_there(Phase.GIVEN_UP))
    assert house.stage.starts == ["gateway-0"] * starts
    assert (house.row().why, house.row().last_lines) == (f"exit code {code}", ("gateway-0 says goodbye",))
    assert str(house.losses[0]) == f"gateway-0 cannot be kept running (exit code {code}): gateway-0 says goodbye"
    assert not house.keeper.has_any("gateway")
    house.stage.fails.clear()
    await house.keeper.launch(order(port=2))
    await until(lambda: house.is_there(Phase.RUNNING))


async def test_an_end_is_asked_for_and_enforced_after_its_time() -> None:
    house = House()
    await house.keeper.end(End("nobody", 1.0))
    for heeds, code in ((True, 0), (False, -9)):
        await house.keeper.launch(order())
        await until(lambda: house.is_there(Phase.RUNNING))
        house.stage.live["gateway-0"].heeds_term = heeds
        await house.keeper.end(End("gateway-0", 0.05))
        assert house.row().phase is Phase.ENDING
        with pytest.raises(Conflict):
            await house.keeper.launch(order())
        await until(lambda: house.keeper.processes.processes == ())
        assert house.stage.diary.pop() == f"gateway-0 ended {code}"


async def test_an_end_may_be_hurried() -> None:
    house = House()
    await house.keeper.launch(order())
    await until(lambda: house.is_there(Phase.RUNNING))
    house.stage.live["gateway-0"].heeds_term = False
    await house.keeper.end(End("gateway-0", 600.0))
    await house.keeper.end(End("gateway-0", 0.0))
    await until(lambda: house.keeper.processes.processes == ())


async def test_closing_ends_one_kind_and_launches_nothing_any_more() -> None:
    house = House()
    await house.keeper.launch(order())
    await until(lambda: house.is_there(Phase.RUNNING))
    await house.keeper.close("worker", 600.0)
    assert house.is_there(Phase.RUNNING)
    house.stage.live["gateway-0"].heeds_term = False
    closing = asyncio.create_task(house.keeper.close("gateway", 600.0))
    await until(lambda: house.is_there(Phase.ENDING))
    house.keeper.hurry()
    async with asyncio.timeout(20):
        await closing
    assert house.keeper.processes.processes == ()
    with pytest.raises(NotReady):
        await house.keeper.launch(order("gateway-1"))


async def test_orders_that_make_no_sense_are_refused() -> None:
    house = House()
    for wrong in (Launch("x", "clown", b"{}", 1, b"{}", "d"), Launch("x", "gateway", b"{}", 1, b"{}", "d")):
        with pytest.raises(InvalidRequest):
            await house.keeper.launch(wrong)
    assert house.keeper.processes.processes == ()


async def test_over_the_wire_the_controller_follows_each_change_and_finds_its_state_again() -> None:
    house = House()
    server = make_server("secret", parent_handlers(house.keeper))
    peer = Peer(listen(server, "127.0.0.1", 0), "secret")
    await server.start()
    client = ParentClient(peer)
    async with asyncio.timeout(20):
        watch = client.watch()
        assert (await anext(watch)).processes == ()
        await client.launch(order())
        phases: list[Phase] = []
        while Phase.RUNNING not in phases:
            phases += [process.phase for process in (await anext(watch)).processes]
        assert await client.load() == b"first"
        await client.save(b"second")
        assert await client.load() == b"second"
        with pytest.raises(Conflict):
            await client.launch(order(port=2))
        house.logs("gateway-0", "a line")
        assert (await client.tail(LogQuestion("gateway-0", -5, 10))).lines == ("a line",)
        await peer.close()
        await server.stop(grace=None)


def test_logs_are_told_by_number_and_bounded() -> None:
    passed: list[str] = []
    logs = LogTails(lambda name, line: passed.append(line))
    for number in range(KEPT_LINES + 10):
        logs("w", str(number))
    assert len(passed) == KEPT_LINES + 10
    assert logs.tail(LogQuestion("w", -2, 10)).lines == (str(KEPT_LINES + 8), str(KEPT_LINES + 9))
    first = logs.tail(LogQuestion("w", 0, 3))
    assert (first.lines, first.next) == (("10", "11", "12"), 13)
    assert logs.tail(LogQuestion("w", first.next, 1)).lines == ("13",)
    end = logs.tail(LogQuestion("w", -1, 10)).next
    assert logs.tail(LogQuestion("w", end, 10)) == logs.tail(LogQuestion("w", end + 50, 10))
    assert logs.tail(LogQuestion("w", end, 10)).lines == ()
    with pytest.raises(InvalidRequest, match="no log of a process 'x'; there are w"):
        logs.tail(LogQuestion("x", 0, 10))
