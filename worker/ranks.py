"""The other ranks of a worker with tensor parallelism: one child process each (`rank.py`), from start to end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass

from ..common.config import EngineConfig, split_threads, to_json
from ..engine.follower import Followers
from ..engine.group import GROUP_TIMEOUT_S

END_TIMEOUT_S = 5.0
"""How long the kernel may take to end a process that was sent SIGKILL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig:
    """What a rank reads from its standard input. `worker`: its worker's name; `parent`: that worker's process."""

    worker: str
    rank: int
    parent: int
    address: str
    token: str
    meeting: str
    timeout_s: float
    engine: EngineConfig


class Ranks:
    """Ranks 1 and up of a worker. Make it on the main thread: on Linux a child is told to die with the *thread* that
    started it.

    followers   rank 0's line to them, lost as soon as one of the processes ends
    """

    def __init__(self, worker: str, engine: EngineConfig, timeout_s: float = GROUP_TIMEOUT_S) -> None:
        self.followers = followers = Followers(engine.tp - 1, timeout_s)
        threads = split_threads(engine.threads or os.cpu_count() or 1, engine.tp)
        self._children = []
        for rank in range(1, engine.tp):
            config = RankConfig(
                worker=worker,
                rank=rank,
                parent=os.getpid(),
                address=followers.address,
                token=followers.token,
                meeting=followers.meeting,
                timeout_s=followers.timeout_s,
                engine=engine,
            )
            child = subprocess.Popen(
                (sys.executable, "-P", "-m", "baton.worker.rank"),
                stdin=subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": str(threads[rank])},
            )
            self._children.append(child)
            threading.Thread(target=self._watch, args=(rank, child, config), name=f"rank {rank}", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._children]

    def close(self) -> None:
        """End them, and return when they have ended."""
        self.followers.close()
        for child in self._children:
            child.kill()  # there is nothing that a rank would have to finish
        for child in self._children:
            child.wait(END_TIMEOUT_S)

    def _watch(self, rank: int, child: subprocess.Popen[bytes], config: RankConfig) -> None:
        """On a thread of its own: tell the child what it is, and whoever waits for it when it ends."""
        assert child.stdin is not None
        with child.stdin as line:  # which stays open: its end is the child's
            line.write(to_json(config) + b"\n")
            line.flush()
            code = child.wait()
        self.followers.lose(f"rank {rank} ended with exit code {code}")
