"""Processes: they get their configuration, their logs arrive, and none outlives its parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from baton.common.child import EXIT_CONFIG
from baton.common.config import EngineConfig, GatewayConfig, WorkerConfig
from baton.common.types import Role
from baton.deploy.launch.launcher import KEPT_LINES, LocalLauncher, LogFiles, Spec, to_line
from baton.deploy.models import ImportJob

GATEWAY = Spec("gateway", GatewayConfig(model="m", model_name="n"))

CHILD = """
import os, sys, time
from baton.common.child import die_with, read_line
from baton.common.json_form import from_json
from baton.deploy.launch.launcher import Envelope
{before}
die_with(from_json(read_line(), Envelope).parent)
print("child", os.getpid(), flush=True)
time.sleep(60)
"""

PARENT = """
import asyncio, sys
from baton.common.config import GatewayConfig
from baton.deploy.launch.launcher import LocalLauncher, Spec
async def main():
    command = (sys.executable, "-c", sys.argv[1])
    launcher = LocalLauncher(log=lambda name, line: print(line, flush=True), command=command)
    await (await launcher.start(Spec("gateway", GatewayConfig(model="m", model_name="n")))).wait()
asyncio.run(main())
"""


def eventually(true: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def script(text: str) -> tuple[str, ...]:
    return (sys.executable, "-P", "-c", text)


@pytest.mark.parametrize(
    ("before", "stopped"),
    [
        ("", False),
        pytest.param("", True, marks=pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")),
        ("sys.platform = 'elsewhere'", False),
    ],
    ids=["parent death signal", "even a stopped child", "lifeline alone"],
)
def test_a_child_dies_with_its_killed_parent(before: str, stopped: bool) -> None:
    with subprocess.Popen([*script(PARENT), CHILD.format(before=before)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        words = parent.stdout.readline().split()
        child = psutil.Process(int(words[1]))
        if stopped:
            child.suspend()
        parent.kill()
        parent.wait(10)
        eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the child is gone")


def test_a_child_whose_parent_is_gone_already_ends_at_once() -> None:
    line = to_line(GATEWAY).replace(b'"parent":%d' % os.getpid(), b'"parent":1')
    assert b'"parent":1,' in line
    with subprocess.Popen(script(CHILD.format(before="")), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(line)
        child.stdin.flush()
        assert child.stdout.read() == b""
        assert child.wait(10) == 1


async def test_ctrl_c_reaches_only_the_parent_and_kill_takes_grandchildren() -> None:
    lines: list[str] = []
    text = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    process = await LocalLauncher(log=lambda _, line: lines.append(line), command=script(text)).start(GATEWAY)
    assert os.getsid(process.pid) == process.pid != os.getsid(0)
    async with asyncio.timeout(10):
        while not lines:
            await asyncio.sleep(0.01)
    grandchild = psutil.Process(int(lines[0]))
    process.kill()
    assert await process.wait() == -signal.SIGKILL
    eventually(lambda: not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE, "grandchild gone")


async def test_configuration_goes_in_and_logs_come_out(tmp_path: Path) -> None:
    text = (
        "import os, sys\n"
        "print(sys.stdin.readline(), end='')\n"
        "print(os.environ['OMP_NUM_THREADS'], os.environ['NUMBA_NUM_THREADS'])\n"
        "print('x' * 200000)\n"
        "for i in range(100): print('line', i, file=sys.stderr)\n"
        "sys.stderr.write('unfinished')\n"
    )
    spec = Spec("decode-1", WorkerConfig(name="decode-1", role=Role.DECODE, engine=EngineConfig(model="m")), threads=3)
    process = await LocalLauncher(log=LogFiles(tmp_path), command=script(text)).start(spec)
    assert await process.wait() == 0
    lines = (tmp_path / "decode-1.log").read_text().splitlines()
    line = next(line for line in lines if line.startswith("{"))
    envelope = json.loads(line)
    assert (envelope["kind"], envelope["parent"]) == ("worker", os.getpid())
    assert envelope["config"]["role"] == "decode"
    assert "3 3" in lines
    assert 60_000 < max(map(len, lines)) < 70_000
    assert lines[-2:] == ["line 99", "unfinished"]
    assert list(process.last_lines) == lines[-KEPT_LINES:]


async def test_a_child_that_dies_before_it_reads_is_only_dead() -> None:
    process = await LocalLauncher(log=lambda *_: None, command=script("raise SystemExit(5)")).start(GATEWAY)
    assert await process.wait() == 5


async def test_what_can_never_work_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    job = ImportJob(source=str(tmp_path / "no.gguf"), target=str(tmp_path / "out"))
    process = await LocalLauncher(log=lambda *_: None).start(Spec("import", job))
    async with asyncio.timeout(60):
        assert await process.wait() == EXIT_CONFIG
    assert "import error" in process.last_lines[-1]
    assert not (tmp_path / "out").exists()


def test_started_by_hand_it_says_how_it_is_started() -> None:
    done = subprocess.run([sys.executable, "-m", "baton.deploy.process"], stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 1
    assert b"started by `baton serve`" in done.stderr
