"""The parent of `baton serve`: starts workers and gateway, keeps them running, and ends them in order.

Ownership runs one way. The controller owns the processes; the processes report to the member table; the gateway's
router reads the table and talks to workers by itself. No request passes through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import socket
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from ...common.clock import Clock, RealClock
from ...common.cluster import WorkerState, WorkerStatus
from ...common.config import GatewayConfig, WorkerConfig
from ...common.errors import BatonError
from ...protos.control import controller_handlers
from ...protos.rpc import listen, make_server
from ..display import Display
from ..launch.launcher import Launcher, Spec
from ..launch.supervisor import RestartPolicy, Supervisor
from .members import MemberTable

GATEWAY = "gateway"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
START_TIMEOUT_S = 600.0
"""How long a start may go on without any worker's state or progress changing."""
POLL_S = 0.2
DRAIN_GRACE_S = 5.0
"""What the gateway gets beyond its own `drain_s` before it is killed."""
WORKER_STOP_S = 10.0
"""The gateway is gone by then, so workers hold no request that anyone waits for."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where clients reach the gateway."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """As seen from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def claim_port(host: str, port: int) -> Endpoint:
    """Find out before anything loads whether the gateway will be able to listen there; 0 picks a free port.
    Raises `BatonError` if not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise BatonError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
        return Endpoint(host, probe.getsockname()[1])


def curl_line(endpoint: Endpoint, gateway: GatewayConfig) -> str:
    """A first request that works as it stands (with keys: once BATON_API_KEY is set in that shell)."""
    prompt: dict[str, Any]
    if has_chat_template(Path(gateway.model)):
        path, prompt = "chat/completions", {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    else:
        path, prompt = "completions", {"prompt": "The capital of France is"}
    body = json.dumps({"model": gateway.model_name, **prompt, "max_tokens": 32, "temperature": 0})
    body = body.replace("'", "'\\''")
    key = ' -H "Authorization: Bearer $BATON_API_KEY"' if gateway.api_keys else ""
    return f"curl {endpoint.url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{body}'"


def has_chat_template(model: Path) -> bool:
    """Whether the checkpoint folder says how a conversation becomes a prompt."""
    if (model / "chat_template.jinja").is_file():
        return True
    for name in ("chat_template.json", "tokenizer_config.json"):
        with contextlib.suppress(OSError, ValueError):
            if json.loads((model / name).read_text(encoding="utf-8")).get("chat_template"):
                return True
    return False


class Controller:
    """One cluster on this machine. `run` is its whole life. `token` is the secret that its processes share; empty: a
    random one."""

    def __init__(
        self,
        workers: list[WorkerConfig],
        gateway: GatewayConfig,
        launcher: Launcher,
        display: Display,
        policy: RestartPolicy | None = None,
        clock: Clock | None = None,
        token: str = "",
    ) -> None:
        self._workers = workers
        self._gateway = gateway
        self._launcher = launcher
        self._display = display
        self._policy = policy or RestartPolicy()
        self._clock = clock or RealClock()
        self._endpoint = Endpoint(gateway.host, gateway.port)
        self._token = token or secrets.token_urlsafe(32)
        self._supervisors: dict[str, Supervisor] = {}
        self._roles = {worker.name: str(worker.role) for worker in workers}
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._serving = False
        self._failed = asyncio.Event()
        self._failure = ""
        self.table = MemberTable()

    async def run(self) -> None:
        """Start, serve until a signal, drain. Raises `BatonError` if it cannot start or can no longer serve."""
        server = make_server(self._token, controller_handlers(self.table))
        address = listen(server, "127.0.0.1", 0)
        await server.start()
        self._take_signals()
        show = asyncio.create_task(self._show(), name="progress")
        try:
            self._start(address)
            await self._first(self._become_ready())
            if self._serving:
                show.cancel()
                if not (self._gateway.api_keys or self._endpoint.host in LOOPBACK):
                    self._display.note(f"anyone who reaches {self._endpoint.host} can use this server: no --api-key")
                self._display.ready(self._endpoint.url, curl_line(self._endpoint, self._gateway))
                await self._first(self._stop.wait())
        finally:
            show.cancel()
            self._display.close()
            await self._drain()
            await server.stop(grace=1.0)

    def request_stop(self) -> None:
        """Drain and end; said a second time: at once."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    # --- Listener: what becomes of the processes ---------------------------------------------------------------------

    def started(self, spec: Spec, pid: int) -> None:
        if spec.name in self._roles:
            self.table.put(WorkerStatus(spec.name, self._roles[spec.name], WorkerState.STARTING, pid=pid))

    def ended(self, spec: Spec, why: str, delay_s: float) -> None:
        self.table.remove(spec.name)
        self._display.note(f"{spec.name} ended ({why}); starting it again in {delay_s:g} s")

    def gave_up(self, spec: Spec, why: str, last_lines: tuple[str, ...]) -> None:
        """Without its gateway the cluster is of no use; without one worker it may be, once it has been ready."""
        text = f"{spec.name} cannot be kept running ({why}); its last lines:"
        self._display.note("\n  ".join((text, *last_lines)))
        if spec.name in self._roles:
            self.table.put(
                WorkerStatus(spec.name, self._roles[spec.name], WorkerState.FAILED, detail=f"given up: {why}")
            )
        if (spec.name == GATEWAY or not self._serving) and not self._failed.is_set():
            last = f": {last_lines[-1]}" if last_lines else ""
            self._failure = f"{spec.name} cannot be kept running ({why}){last}"
            self._failed.set()

    # --- phases ------------------------------------------------------------------------------------------------------

    def _start(self, address: str) -> None:
        token = self._token
        workers = (replace(worker, controller=address, cluster_token=token) for worker in self._workers)
        specs = [Spec(worker.name, worker, worker.engine.threads) for worker in workers]
        specs.append(Spec(GATEWAY, replace(self._gateway, controller=address, cluster_token=token)))
        for spec in specs:
            supervisor = Supervisor(spec, self._launcher, self, self._policy, self._clock)
            self._supervisors[spec.name] = supervisor
            supervisor.start()

    async def _become_ready(self) -> None:
        """Until the gateway says that it can answer. Raises `BatonError` once nothing has moved for a long time."""
        seen, deadline = -1, 0.0
        async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
            while not await self._answers(client):
                if self.table.members.version != seen:
                    seen, deadline = self.table.members.version, self._clock.now() + START_TIMEOUT_S
                if self._clock.now() > deadline:
                    states = ", ".join(f"{w.name} {w.state} {w.detail}".strip() for w in self.table.members.workers)
                    raise BatonError(f"no progress for {START_TIMEOUT_S:.0f} s while starting: {states}")
                await asyncio.sleep(POLL_S)
        self._serving = True

    async def _answers(self, client: httpx.AsyncClient) -> bool:
        """Ready means all workers: a cluster that begins to serve with half of them would surprise."""
        if self._roles.keys() != {w.name for w in self.table.members.workers if w.state == "ready"}:
            return False
        try:
            return (await client.get(f"{self._endpoint.url}/ready")).status_code == 200
        except httpx.HTTPError:
            return False

    async def _first(self, goal: Coroutine[Any, Any, object]) -> None:
        """Wait for `goal` or a request to stop. Raises what `goal` raises, and `BatonError` on a failure."""
        tasks = [asyncio.create_task(wait) for wait in (goal, self._stop.wait(), self._failed.wait())]
        done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        for task in done:
            task.result()
        if self._failed.is_set():
            raise BatonError(self._failure)

    async def _drain(self) -> None:
        """The gateway first: it refuses new requests and finishes its streams, for which it needs the workers."""
        if self._serving:
            self._display.note("draining; Ctrl-C again to stop at once")
        gateway = self._supervisors.pop(GATEWAY, None)
        if gateway is not None:
            await gateway.stop(self._gateway.drain_s + DRAIN_GRACE_S, self._hurry)
        await asyncio.gather(*(s.stop(WORKER_STOP_S, self._hurry) for s in self._supervisors.values()))

    async def _show(self) -> None:
        async for members in self.table.watch():
            self._display.members(members)

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.request_stop)
