"""The systems that are compared, each as processes that are started for a measurement and ended after it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..common.errors import NotReady
from .wire import HttpClient

BATON = str(Path(sys.executable).with_name("baton"))
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
PR_SET_PDEATHSIG = 1
"""Of prctl(2), which only Linux has; so do the comparisons."""


def free_port() -> int:
    """A TCP port of the loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def wait_ready(http: HttpClient, timeout_s: float) -> None:
    """Until the gateway says that it is ready. Raises `NotReady` with its last answer."""
    deadline, answer = time.monotonic() + timeout_s, "no answer"
    while time.monotonic() < deadline:
        try:
            response = await http.get("/ready", timeout_s=5.0)
        except (OSError, TimeoutError) as error:
            answer = str(error)
        else:
            if response.status == 200:
                return
            answer = response.body[:200].decode(errors="replace")
        await asyncio.sleep(0.1)
    raise NotReady(f"not ready after {timeout_s:.0f} s: {answer}")


def model_folder(model: str) -> Path:
    """The checkpoint folder of `model`; "demo" and GGUF files are converted first, once."""
    if Path(model).is_dir():
        return Path(model)
    done = subprocess.run([BATON, "model", "import", model], stdout=subprocess.PIPE, text=True, timeout=600, check=True)
    return Path(done.stdout.strip().splitlines()[-1])


@asynccontextmanager
async def baton(model: Path, shape: Sequence[str], threads: int) -> AsyncIterator[HttpClient]:
    """`baton serve MODEL` in a shape such as ("--colocated", "1"), with `threads` for all its workers together.
    It asks for no key, whatever the environment says. Raises `NotReady`, with the end of its log, where it does not
    start."""
    port = free_port()
    arguments = [BATON, "serve", str(model), *shape, "--threads", str(threads), "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        child = await asyncio.create_subprocess_exec(
            *arguments, stdout=log, stderr=log, start_new_session=True, preexec_fn=_drain_with_parent,
            env={name: value for name, value in os.environ.items() if name != "BATON_API_KEY"}
            | {"BATON_NAME": f"bench-{port}"},
        )  # fmt: skip
        http = HttpClient(f"http://127.0.0.1:{port}")
        try:
            await _ready_or_dead(http, child)
            yield http
        except NotReady as error:
            log.seek(0)
            raise NotReady(f"{error.message}\n{log.read()[-2000:].decode(errors='replace')}") from error
        finally:
            http.close()
            await _end(child)


def _drain_with_parent() -> None:
    """In the child: SIGTERM when the bench dies, however it dies, so that no server is left behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


async def _ready_or_dead(http: HttpClient, child: asyncio.subprocess.Process) -> None:
    ready = asyncio.create_task(wait_ready(http, START_TIMEOUT_S))
    dead = asyncio.create_task(child.wait())
    await asyncio.wait({ready, dead}, return_when=asyncio.FIRST_COMPLETED)
    dead.cancel()
    if child.returncode is not None:
        ready.cancel()
        raise NotReady(f"baton serve ended with code {child.returncode}")
    await ready


async def _end(child: asyncio.subprocess.Process) -> None:
    """Ask to drain, wait, and end the whole process group where that is not enough."""
    if child.returncode is None:
        child.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(child.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            os.killpg(child.pid, signal.SIGKILL)
            await child.wait()


@dataclass(frozen=True, slots=True)
class Generated:
    """What transformers did with one batch. Seconds since the call: `steps[i]` is when token i of all was chosen."""

    steps: list[float]
    wall_s: float


class Reference:
    """The process that runs transformers (`reference.py`), asked one batch at a time."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child

    async def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Generated:
        """Greedy, exactly `output_len` tokens each, one batch. Raises `NotReady` where the process has ended."""
        answer = await self._ask({"prompts": [list(prompt) for prompt in prompts], "output_len": output_len})
        return Generated(answer["steps"], answer["wall_s"])

    async def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(msgspec.json.encode(command) + b"\n")
        async with asyncio.timeout(START_TIMEOUT_S):
            line = await self._child.stdout.readline()
        if not line:
            raise NotReady("the process that runs transformers has ended")
        return dict(msgspec.json.decode(line))


@asynccontextmanager
async def reference(model: Path, threads: int) -> AsyncIterator[Reference]:
    """transformers on `model` in float32, in a process of its own."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baton.bench.reference", str(model), str(threads)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
        env=os.environ | limits | quiet,
    )
    try:
        yield Reference(child)
    finally:
        assert child.stdin is not None
        child.stdin.close()
        try:
            await asyncio.wait_for(child.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            child.kill()
