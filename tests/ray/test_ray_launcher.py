"""Workers in Ray actors, on two nodes: placed as asked, heard, ended, and lost with what holds them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import ray

from baton.common.config import EngineConfig, WorkerConfig
from baton.common.types import Role
from baton.deploy.launch import ray_launcher
from baton.deploy.launch.launcher import Resources, Spec
from baton.deploy.launch.ray_launcher import RayLauncher
from baton.deploy.launch.ray_process import RayProcess
from tests.ray.nodes import ROOT, Nodes, actors, ended, eventually, groups

ADDRESS = "127.0.0.1:6379"

CHILD = """
import os, sys, time
from baton.common.child import die_with, read_line
from baton.common.config import WorkerConfig
from baton.common.json_form import from_json, from_plain
from baton.deploy.launch.launcher import Envelope
envelope = from_json(read_line(), Envelope)
die_with(envelope.parent)
config = from_plain(envelope.config, WorkerConfig)
print("I am", config.name, "at", config.host, os.environ["OMP_NUM_THREADS"], os.nice(0), flush=True)
if config.model_name == "flood":
    print(*("line %d" % i for i in range(20_000)), sep="\\n")
    sys.exit(7)
time.sleep(600)
"""

DRIVER = """
import asyncio, sys
from tests.ray.test_ray_launcher import COMMAND, ADDRESS, spec
from baton.deploy.launch import ray_launcher
launcher = ray_launcher.RayLauncher(print, ray_launcher.make(print, ADDRESS).host, COMMAND)
async def main():
    process = await launcher.start(spec("orphan-0"))
    print("pid", process.pid, flush=True)
    await process.wait()
asyncio.run(main())
"""

COMMAND = (sys.executable, "-P", "-c", CHILD)


class Log:
    """All lines, by process."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, name: str, line: str) -> None:
        self.lines.append((name, line))

    async def has(self, name: str, text: str, timeout_s: float = 20.0) -> str:
        """The first line of `name` with `text` in it, as soon as it is there."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for who, line in self.lines:
                if who == name and text in line:
                    return line
            await asyncio.sleep(0.05)
        raise AssertionError(f"{name} has not said {text!r}: {self.lines}")


def spec(name: str, model_name: str = "", **resources: object) -> Spec:
    config = WorkerConfig(name=name, role=Role.DECODE, engine=EngineConfig(model="m"), model_name=model_name)
    return Spec(name, config, 1, Resources(**{"pool": name.rpartition("-")[0]} | resources))


async def code_of(process: RayProcess, timeout_s: float = 30.0) -> int:
    async with asyncio.timeout(timeout_s):
        return await process.wait()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def launcher(nodes: Nodes, log: Log) -> Iterator[RayLauncher]:
    """When the test is over, it holds nothing of the cluster any more."""
    yield RayLauncher(log, ray_launcher.make(log, ADDRESS).host, COMMAND, place_s=3.0)
    eventually(lambda: not groups() and not actors(), f"nothing is held: {groups()} {actors()}")
    ray.shutdown()


async def test_pools_are_spread_or_packed_and_workers_are_heard(launcher: RayLauncher, log: Log) -> None:
    names = ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    spread = await asyncio.gather(*(launcher.start(spec(name)) for name in names))
    assert [{p.node for p in pool} for pool in (spread[:2], spread[2:])] == [{"first", "second"}] * 2
    packed = await asyncio.gather(*(launcher.start(spec(f"packed-{i}", placement="pack")) for i in range(2)))
    assert len({p.node for p in packed}) == 1
    special = await launcher.start(spec("special-0", ranks=2, custom=(("second", 1.0),), cpus=0.5))
    assert special.node == "second"
    for name in ("decode-1", "special-0"):
        assert await log.has(name, "I am") == f"I am {name} at 127.0.0.1 1 0"
    assert sorted(groups()) == sorted([*names, "packed-0", "packed-1", "special-0"])
    for process in spread:
        process.terminate()
    for process in (*packed, special):
        process.kill()
    assert [await code_of(p) for p in spread] == [-signal.SIGTERM] * 4
    assert [await code_of(p) for p in (*packed, special)] == [-signal.SIGKILL] * 3
    assert "I am special-0 at 127.0.0.1 1 0" in special.last_lines


async def test_a_flood_of_lines_is_cut_and_the_last_words_and_the_exit_code_arrive(
    launcher: RayLauncher, log: Log
) -> None:
    process = await launcher.start(spec("chatty-0", "flood"))
    assert await code_of(process) == 7
    lines = [line for name, line in log.lines if name == "chatty-0"]
    assert lines[-1] == "line 19999"
    assert list(process.last_lines) == lines[-20:]


async def test_a_frozen_actor_cannot_hinder_its_end(launcher: RayLauncher) -> None:
    process = await launcher.start(spec("frozen-0"))
    child = psutil.Process(process.pid)
    actor = child.parent()
    actor.suspend()
    process.terminate()
    process.kill()
    assert await code_of(process, 10.0) == -signal.SIGKILL
    eventually(lambda: ended(actor) and ended(child), "the actor and its child are gone", 20.0)


async def test_a_worker_ends_with_its_actor_and_says_so(launcher: RayLauncher) -> None:
    process = await launcher.start(spec("lost-0"))
    child = psutil.Process(process.pid)
    child.parent().kill()
    assert await code_of(process) == -signal.SIGKILL
    assert f" lost-0 warning lost with its Ray actor on {process.node}: " in process.last_lines[-1]
    eventually(lambda: ended(child), "the child is gone")


async def test_where_no_node_has_room_it_says_what_is_missing_and_leaves_nothing(
    launcher: RayLauncher, log: Log
) -> None:
    big = spec("big-0", cpus=8.0, custom=(("first", 1.0), ("fast", 2.0)))
    missing = "no node has room for CPU 8, first 1, fast 2: "
    with pytest.raises(OSError, match=missing) as error:
        await launcher.start(big)
    assert "first has no fast at all" in str(error.value) and "second has no first, no fast at all" in str(error.value)
    assert await log.has("big-0", "waits for resources: no node has room")
    waiting = asyncio.create_task(launcher.start(big))
    async with asyncio.timeout(10):
        while "big-0" not in await asyncio.to_thread(groups):
            await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_start_that_waits_gets_the_room_that_another_leaves(launcher: RayLauncher) -> None:
    first = await launcher.start(spec("big-0", cpus=8.0, custom=(("second", 8.0),)))
    waiting = asyncio.create_task(launcher.start(spec("big-1", cpus=8.0, custom=(("second", 8.0),))))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    first.terminate()
    second = await waiting
    assert second.node == "second"
    second.kill()
    await code_of(second)


def test_a_killed_driver_leaves_nothing(nodes: Nodes) -> None:
    code = [sys.executable, "-c", DRIVER]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    with subprocess.Popen(code, env=env, stdout=subprocess.PIPE, text=True, cwd="/") as driver:
        assert driver.stdout is not None
        pid = next(int(line.split()[1]) for line in driver.stdout if line.startswith("pid"))
        child = psutil.Process(pid)
        assert groups() == ["orphan-0"]
        driver.kill()
    eventually(lambda: ended(child), "the worker is gone")
    eventually(lambda: not groups() and not actors(), "nothing is held")


async def test_when_a_node_dies_its_worker_is_lost_soon_and_the_next_start_goes_elsewhere(
    nodes: Nodes, launcher: RayLauncher
) -> None:
    workers = await asyncio.gather(*(launcher.start(spec(f"decode-{i}")) for i in range(2)))
    here, there = sorted(workers, key=lambda process: process.node)
    assert (here.node, there.node) == ("first", "second")
    child = psutil.Process(there.pid)
    assert nodes.second is not None
    nodes.second.crash()
    assert await code_of(there, 20.0) == -signal.SIGKILL
    eventually(lambda: ended(child), "the child is gone")
    again = await launcher.start(spec(there.name))
    assert again.node == "first"
    for process in (here, again):
        process.kill()
        await code_of(process)
