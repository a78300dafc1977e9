"""The other ranks of a worker with tensor parallelism: one child process each (`rank.py`), from start to end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from dataclasses import dataclass

from ..common.config import WorkerConfig, split_threads
from ..common.json_form import to_json
from ..engine.follower import GROUP_TIMEOUT_S, Followers

END_TIMEOUT_S = 5.0
"""How long the kernel may take to end a process that was sent SIGKILL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig:
    """What a rank reads from its standard input. `epoch`: its worker's incarnation; `parent`: that worker's process."""

    worker: WorkerConfig
    epoch: int
    rank: int
    parent: int
    address: str
    token: str
    meeting: str
    timeout_s: float


class Ranks:
    """Ranks 1 and up of a worker. Make it on the main thread: on Linux a child is told to die with the *thread* that
    started it.

    followers   rank 0's line to them, lost as soon as one of the processes ends
    """

    def __init__(self, worker: WorkerConfig, epoch: int, timeout_s: float = GROUP_TIMEOUT_S) -> None:
        engine = worker.engine
        self.followers = followers = Followers(engine.tp - 1, timeout_s)
        threads = split_threads(engine.threads or os.cpu_count() or 1, engine.tp)
        self._children = []
        for rank in range(1, engine.tp):
            config = RankConfig(
                worker=worker,
                epoch=epoch,
                rank=rank,
                parent=os.getpid(),
                address=followers.address,
                token=followers.token,
                meeting=followers.meeting,
                timeout_s=followers.timeout_s,
            )
            child = subprocess.Popen(
                (sys.executable, "-P", "-m", "baton.worker.rank"),
                stdin=subprocess.PIPE,  # which stays open: when this process ends, so does the child
                bufsize=0,
                env=os.environ | {"OMP_NUM_THREADS": str(threads[rank])},
            )
            self._children.append(child)
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has died already: the watch will tell
                child.stdin.write(to_json(config) + b"\n")
            threading.Thread(target=self._watch, args=(rank, child), name=f"rank {rank}", daemon=True).start()

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
            assert child.stdin is not None
            child.stdin.close()

    def _watch(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        """On a thread of its own: wait for the child's end, for whatever reason."""
        code = child.wait()
        self.followers.lose(f"rank {rank} ended with exit code {code}")
