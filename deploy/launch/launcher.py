"""Starts processes and ends them. `LocalLauncher` starts them on this machine; other launchers place them elsewhere.

A child learns what it is from one line of JSON on its standard input, and holds on to that input: when its parent
dies, however it dies, the input ends and the child with it (`common/child.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...common.config import ControllerConfig, GatewayConfig, WorkerConfig
from ...common.json_form import to_json, to_plain
from ..models import ImportJob
from .gpus import Gpus, installed

Config = WorkerConfig | GatewayConfig | ControllerConfig | ImportJob

KINDS: dict[str, type[Config]] = {
    "worker": WorkerConfig,
    "gateway": GatewayConfig,
    "controller": ControllerConfig,
    "import": ImportJob,
}
"""Kinds of processes, by the name that a child reads, and the configuration of each."""

KEPT_LINES = 20
"""Last log lines of a process that are kept, to be shown when it dies."""

MAX_LINE = 64 << 10
"""A longer log line is cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a worker needs of the node that it is placed on. `cpus`, `gpus` and `custom` are for each of its `ranks`,
    which all go to one node. On one machine only `gpus` counts: each rank sees the one that it is given, and with 0 a
    worker sees all of them.

    accelerator_type    as Ray names it: H100
    custom              (name, amount) of Ray's custom resources
    pool, placement     workers of one pool are spread over nodes, or packed on few
    """

    pool: str = ""
    ranks: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    accelerator_type: str = ""
    custom: tuple[tuple[str, float], ...] = ()
    placement: str = "spread"


@dataclass(frozen=True, slots=True)
class Spec:
    """A process to start. `threads` bounds what its numeric libraries use."""

    name: str
    config: Config
    threads: int = 1
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a child reads from its standard input. `parent`: the process it must not outlive."""

    name: str
    kind: str
    parent: int
    config: dict[str, Any]


class Process(Protocol):
    """A started process."""

    @property
    def pid(self) -> int: ...

    @property
    def node(self) -> str:
        """Which machine it is on, for people; empty: this one."""
        ...

    @property
    def last_lines(self) -> Sequence[str]:
        """The end of its log."""
        ...

    async def wait(self) -> int:
        """Its exit code, negative for a signal, after all that it logged has been taken in."""
        ...

    def terminate(self) -> None:
        """Ask it to finish what it has begun and to exit."""
        ...

    def kill(self) -> None:
        """End it, and what it started, at once."""
        ...


class Launcher(Protocol):
    async def start(self, spec: Spec) -> Process:
        """Raises `OSError` if the process cannot be started."""
        ...


def kind_of(config: Config) -> str:
    """The key in `KINDS`."""
    return next(kind for kind, cls in KINDS.items() if isinstance(config, cls))


def to_line(spec: Spec) -> bytes:
    """The line that `spec` becomes on a child's standard input."""
    return to_json(Envelope(spec.name, kind_of(spec.config), os.getpid(), to_plain(spec.config))) + b"\n"


@dataclass(frozen=True, slots=True)
class LogFiles:
    """One file a process in a folder, appended to over restarts."""

    folder: Path

    def __call__(self, name: str, line: str) -> None:
        with (self.folder / f"{name}.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@dataclass(slots=True)
class LocalProcess:
    """A child of this process, in a session of its own: the terminal's Ctrl-C reaches only the parent, which then
    ends its children in order."""

    name: str
    child: asyncio.subprocess.Process
    log: Callable[[str, str], None]
    give_back: Callable[[], None] = lambda: None
    """Called when it has ended."""
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    node: str = ""
    _reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self.child.pid

    async def wait(self) -> int:
        code = await self.child.wait()
        self.kill()  # what it started and left behind
        self.give_back()
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=1.0)
        return code

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)

    def follow(self) -> None:
        """Begin to take in its log."""
        self._reader = asyncio.create_task(self._read(), name=f"log of {self.name}")

    async def _read(self) -> None:
        stream = self.child.stdout
        assert stream is not None
        rest = b""
        while data := await stream.read(MAX_LINE):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line)
            rest = rest[:MAX_LINE]
        if rest:
            self._take(rest)

    def _take(self, line: bytes) -> None:
        text = line[:MAX_LINE].decode(errors="replace")
        self.last_lines.append(text)
        with contextlib.suppress(OSError):  # a full disk must not stop the reading, and so block the child
            self.log(self.name, text)


@dataclass(frozen=True, slots=True)
class LocalLauncher:
    """Starts `python -m baton.deploy.process` on this machine.

    Call it from the main thread only: on Linux a child is also told to die with the *thread* that started it.
    """

    log: Callable[[str, str], None]
    """Gets each line that a child logs, with the child's name."""
    command: tuple[str, ...] = (sys.executable, "-P", "-m", "baton.deploy.process")
    """-P: the current folder must not become a place to import from."""
    gpus: Gpus = field(default_factory=lambda: Gpus(installed()))

    async def start(self, spec: Spec) -> LocalProcess:
        ranks, share = spec.resources.ranks, spec.resources.gpus
        devices = await self.gpus.take(ranks, share) if share else ()
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
        with contextlib.ExitStack() as taken:
            taken.callback(self.gpus.give_back, devices, share)
            child = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | _thread_limits(spec.threads) | visible,
            )
            process = LocalProcess(spec.name, child, self.log, taken.pop_all().close)
        process.follow()
        assert child.stdin is not None
        child.stdin.write(to_line(spec))
        with contextlib.suppress(ConnectionError):  # it died already: `wait` tells
            await child.stdin.drain()
        return process


def _thread_limits(threads: int) -> dict[str, str]:
    """Numeric libraries read these when they are loaded; each would otherwise take all cores."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")
    return dict.fromkeys(names, str(threads))
