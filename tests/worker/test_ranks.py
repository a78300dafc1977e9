"""Ranks as processes: they compute together, a lost one breaks the engine soon and for good, and none is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from baton.common.config import EngineConfig, WorkerConfig
from baton.common.errors import EngineBroken
from baton.common.json_form import to_json
from baton.common.types import Role
from baton.engine.follower import READY
from baton.engine.plan import Slice, StepPlan
from baton.engine.runner import Engine, build_engine
from baton.worker.ranks import Ranks

from ..e2e.serving import eventually, gone
from ..engine.test_model import advance, prompts, sequence, start
from ..tiny import make_checkpoint

TIMEOUT_S = 2.0

WORKER = """
import sys, time
from baton.common.config import EngineConfig, WorkerConfig
from baton.common.types import Role
from baton.worker.ranks import Ranks
engine = EngineConfig(model=sys.argv[1], tp=2, device="cpu", threads=2)
ranks = Ranks(WorkerConfig(name="worker", role=Role.COLOCATED, engine=engine), 1)
ranks.followers.wait_for("here")
print(*ranks.pids, flush=True)
time.sleep(60)
"""

LOADING = """
import asyncio, sys
from baton.common.config import WorkerConfig
from baton.common.json_form import from_json
from baton.worker.main import run
asyncio.run(run(from_json(sys.stdin.buffer.readline(), WorkerConfig)))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "qwen2", num_attention_heads=4, num_key_value_heads=1)


def worker(checkpoint: Path, tp: int, **settings: Any) -> WorkerConfig:
    engine = EngineConfig(model=str(checkpoint), tp=tp, device="cpu", threads=tp, kv_memory=4 << 20)
    return WorkerConfig(name="worker", role=Role.COLOCATED, engine=engine, **settings)


@contextmanager
def running(checkpoint: Path, tp: int, timeout_s: float = TIMEOUT_S, **settings: Any) -> Iterator[tuple[Ranks, Engine]]:
    """An engine over `tp - 1` child processes, of which nothing is left afterwards."""
    config = worker(checkpoint, tp, **settings)
    ranks = Ranks(config, 1, timeout_s)
    processes = [psutil.Process(pid) for pid in ranks.pids]
    with closing(ranks):
        yield ranks, build_engine(config.engine, lambda share: None, followers=ranks.followers)
    assert not any(process.is_running() for process in processes)
    assert not os.path.exists(os.path.dirname(ranks.followers.meeting))


def tokens_of(engine: Engine) -> list[list[int]]:
    """A prompt in two chunks beside one at once, and then a few tokens of both."""
    running = [sequence(tokens, 1 + 20 * i) for i, tokens in enumerate(prompts(40, 9))]
    advance(engine, [(running[0], 25)])
    advance(engine, [(running[0], 15), (running[1], 9)])
    for _ in range(20):
        advance(engine, [(each, 1) for each in running])
    return [each.tokens for each in running]


def test_four_processes_compute_what_one_does(checkpoint: Path) -> None:
    with running(checkpoint, 4) as (ranks, engine):
        assert len(ranks.pids) == 3
        assert tokens_of(engine) == tokens_of(start(checkpoint))


@pytest.mark.parametrize(("number", "timeout_s"), [(signal.SIGKILL, 100 * TIMEOUT_S), (signal.SIGSTOP, TIMEOUT_S)])
def test_a_lost_rank_breaks_the_engine_for_good(checkpoint: Path, number: signal.Signals, timeout_s: float) -> None:
    """A dead one at once: nobody waits for the timeout, which is longer than this test may take."""
    step = StepPlan(9, [Slice.of(sequence(prompts(9)[0], 1), 0, 9)])
    with running(checkpoint, 2, timeout_s) as (ranks, engine):
        engine.runner.launch(step).results()
        os.kill(ranks.pids[0], number)
        for _ in range(2):
            with pytest.raises(EngineBroken):
                engine.runner.launch(step).results()
        with pytest.raises(EngineBroken):
            ranks.followers.send("anything")


def test_a_rank_that_ends_before_it_is_ready_is_told_of(checkpoint: Path) -> None:
    config = worker(checkpoint, 2)
    with closing(Ranks(config, 1, TIMEOUT_S)) as ranks:
        os.kill(ranks.pids[0], signal.SIGKILL)
        with pytest.raises(EngineBroken, match="rank 1 ended with exit code -9"):
            build_engine(config.engine, lambda share: None, followers=ranks.followers)


@pytest.mark.parametrize("stopped", [False, True])
def test_ranks_end_with_their_worker_even_stopped_ones(checkpoint: Path, tmp_path: Path, stopped: bool) -> None:
    command, env = [sys.executable, "-P", "-c", WORKER, str(checkpoint)], os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as worker:
        assert worker.stdout is not None
        child = psutil.Process(int(worker.stdout.readline()))
        if stopped:
            child.send_signal(signal.SIGSTOP)
        worker.kill()
    eventually(lambda: gone(child), "the rank has ended")


def test_each_rank_takes_lanes_in_at_a_door_of_its_own(checkpoint: Path) -> None:
    with running(checkpoint, 2) as (ranks, _):
        ((door,),) = ranks.followers.wait_for(READY)
    assert door["tcp"] != door["grpc"]
    for transport in ("tcp", "grpc"):
        host, _, port = door[transport].rpartition(":")
        assert host == "127.0.0.1" and int(port) > 0


def test_a_worker_that_is_told_to_stop_while_it_loads_ends_with_its_ranks(checkpoint: Path) -> None:
    """Also where one of them says nothing any more."""
    with subprocess.Popen([sys.executable, "-P", "-c", LOADING], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(to_json(worker(checkpoint, 2)) + b"\n")
        process.stdin.flush()
        parent = psutil.Process(process.pid)
        eventually(parent.children, "a rank has been started", 60.0)
        (child,) = parent.children()
        child.send_signal(signal.SIGSTOP)
        process.terminate()
        assert process.wait(10.0) == 0
    eventually(lambda: gone(child), "the rank has ended")
