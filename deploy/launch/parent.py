"""The parent: the process of `baton serve`. It owns all others, and is thin: it keeps running what the controller tells
it to, keeps the controller running, shows how the start goes, and ends everything in order.

    parent ── controller        for ever; alone it may die at any time
       ├───── gateways          as the controller says
       └───── workers           as the controller says, by the chosen launcher
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from ...common.child import show_as
from ...common.clock import Clock, RealClock
from ...common.config import ControllerConfig, GatewayConfig
from ...common.errors import BatonError, InvalidRequest
from ...common.json_form import from_json
from ...protos.control import parent_handlers
from ...protos.rpc import listen, make_server
from .. import models
from ..cluster import Place, desired_state
from ..control.desired import Desired, save
from ..control.status import ClusterStatus
from ..display import Display, curl_line, make_display
from ..settings import ServeConfig
from .keeper import Keeper, Loss
from .launcher import Launcher, LocalLauncher, LogFiles, Process, Spec
from .logs import LogTails
from .ports import Port, claim_port
from .runfile import Claim, RunFile
from .supervisor import FOR_EVER, RestartPolicy, Supervisor

START_TIMEOUT_S = 600.0
"""How long a start may go on without any worker's state or progress changing."""
POLL_S = 0.2
DRAIN_GRACE_S = 5.0
"""What a gateway gets beyond its own `drain_s` before it is killed."""
WORKER_STOP_S = 10.0
"""The gateways are gone by then, so workers hold no request that anyone waits for."""
CONTROLLER_STOP_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is settled before the first process starts. `controller` lacks the parent's address."""

    controller: ControllerConfig
    desired: Desired
    door: Port
    admin: Port

    @property
    def gateway(self) -> GatewayConfig:
        return self.desired.gateways[0]


class Parent:
    """One cluster. `run` is its whole life. Workers are started by `workers`, all else by `local`."""

    def __init__(
        self,
        plan: Plan,
        local: Launcher,
        workers: Launcher,
        logs: LogTails,
        display: Display,
        policy: RestartPolicy | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._plan = plan
        self._local = local
        self._display = display
        self._clock = clock or RealClock()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._failed = asyncio.Event()
        self._failure = ""
        self._serving = False
        self.keeper = Keeper(
            launchers={"": local, "worker": workers},
            logs=logs,
            policy=policy or RestartPolicy(),
            clock=self._clock,
            note=display.note,
            lost=self._lost,
            saved=save(plan.desired),
        )

    async def run(self) -> None:
        """Start, serve until a signal, drain. Raises `BatonError` if it cannot start or can no longer serve."""
        server = make_server(self._plan.controller.cluster_token, parent_handlers(self.keeper))
        config = replace(self._plan.controller, parent=listen(server, "127.0.0.1", 0))
        await server.start()
        self._take_signals()
        controller = Supervisor(Spec("controller", config), self._local, self, FOR_EVER, self._clock)
        controller.start()
        try:
            await self._first(self._become_ready())
            if self._serving:
                self._welcome()
                await self._first(self._stop.wait())
        finally:
            self._display.close()
            await self._drain(controller)
            await server.stop(grace=1.0)

    def request_stop(self) -> None:
        """Drain and end; said a second time: at once."""
        if self._stop.is_set():
            self._hurry.set()
            self.keeper.hurry()
        self._stop.set()

    # --- Listener: what becomes of the controller --------------------------------------------------------------------

    def started(self, spec: Spec, process: Process) -> None:
        """Nothing to do: it finds out by itself where it is."""

    def ended(self, spec: Spec, why: str, delay_s: float) -> None:
        self._display.note(f"{spec.name} ended ({why}); starting it again in {delay_s:g} s")

    def gave_up(self, spec: Spec, why: str, last_lines: tuple[str, ...]) -> None:
        self._lost(Loss(spec.name, "controller", why, last_lines))

    # --- phases ------------------------------------------------------------------------------------------------------

    def _lost(self, loss: Loss) -> None:
        """While it starts any loss is the end; later only that of the last gateway. What else is lost, `baton status`
        shows."""
        text = f"{loss.name} cannot be kept running ({loss.why}); its last lines:"
        self._display.note("\n  ".join((text, *loss.last_lines)))
        needed = loss.kind == "controller" or (loss.kind == "gateway" and not self.keeper.has_any("gateway"))
        if (needed or not self._serving) and not self._failed.is_set():
            self._failure = str(loss)
            self._failed.set()

    async def _become_ready(self) -> None:
        """Until all workers are ready and a gateway answers. Raises `BatonError` once nothing has moved for long."""
        seen, deadline = None, 0.0
        headers = {"Authorization": f"Bearer {self._plan.controller.admin_token}"}
        async with httpx.AsyncClient(timeout=5.0, trust_env=False, headers=headers) as client:
            while True:
                status = await self._ask(client)
                rows = () if status is None else status.workers
                self._display.workers(rows)
                if status is not None and _complete(status) and await self._answers(client):
                    break
                progress = [(row.name, row.state, row.progress) for row in rows]
                if progress != seen:
                    seen, deadline = progress, self._clock.now() + START_TIMEOUT_S
                if self._clock.now() > deadline:
                    states = ", ".join(f"{row.name} {row.state} {row.detail}".strip() for row in rows)
                    raise BatonError(f"no progress for {START_TIMEOUT_S:.0f} s while starting: {states}")
                await asyncio.sleep(POLL_S)
        self._serving = True

    async def _ask(self, client: httpx.AsyncClient) -> ClusterStatus | None:
        """What the controller says, as `baton status` asks it; None while it does not."""
        try:
            answer = await client.get(f"{self._plan.admin.url}/v1/status")
            return from_json(answer.content, ClusterStatus) if answer.is_success else None
        except httpx.HTTPError:
            return None

    async def _answers(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self._plan.door.url}/ready", headers={"Authorization": ""})).is_success
        except httpx.HTTPError:
            return False

    def _welcome(self) -> None:
        door, gateway = self._plan.door, self._plan.gateway
        if not (gateway.api_keys or door.is_local):
            self._display.note(f"anyone who reaches {door.host} can use this server: no --api-key")
        self._display.ready(door.url, curl_line(door.url, gateway))

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

    async def _drain(self, controller: Supervisor) -> None:
        """Gateways first: they refuse new requests and finish their streams, for which they need the workers. The
        controller, which tells how it goes, last: nothing is launched for it any more."""
        if self._serving:
            self._display.note("draining; Ctrl-C again to stop at once")
        await self.keeper.close("gateway", self._plan.gateway.drain_s + DRAIN_GRACE_S)
        await self.keeper.close("worker", WORKER_STOP_S)
        await controller.stop(CONTROLLER_STOP_S, self._hurry)

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.request_stop)


def _complete(status: ClusterStatus) -> bool:
    """Ready means all: a cluster that begins to serve with half of its workers would surprise."""
    workers = sum(pool.wanted for pool in status.pools)
    ready = [row.state for row in status.workers] == ["ready"] * workers
    return ready and all(row.state == "serving" for row in status.gateways)


def serve(config: ServeConfig, converter: Callable[[Display], models.Convert]) -> None:
    """`baton serve`: until it is told to end. `converter`: what makes a checkpoint folder of a GGUF file, where there
    is none yet. Raises `InvalidRequest` for what can be known to be wrong before anything starts, `BatonError`."""
    source = models.find(config.model)
    door = claim_port(config.host, config.port)
    admin = claim_port(config.admin_host, config.admin_port)
    show_as("serve")  # `ps` shows what it is, and no longer a key among its arguments
    display = make_display()
    logs = LogTails(_log_files(config.log_dir) if config.log_dir else display.log)
    local = LocalLauncher(log=logs)
    claim = Claim(config.name)
    try:
        folder = models.prepare(source, converter(display))
        workers, host = _launcher(config.launcher, local, logs)
        control = claim_port(host, 0)
        token = os.environ.get("BATON_CLUSTER_TOKEN") or secrets.token_urlsafe(32)
        name = config.model_name or source.name
        controller = ControllerConfig(
            parent="",
            host=host,
            port=control.port,
            cluster_token=token,
            admin_host=admin.host,
            admin_port=admin.port,
            admin_token=config.admin_token or secrets.token_urlsafe(32),
            model_name=name,
            launcher=config.launcher,
        )
        own = tuple(claim_port(config.host, 0) for _ in range(config.gateways) if config.gateways > 1)
        place = Place(folder, name, f"{host}:{control.port}", door.port, token, tuple(port.port for port in own))
        plan = Plan(controller=controller, desired=desired_state(config, place), door=door, admin=admin)
        claim.publish(RunFile(config.name, os.getpid(), admin.url, controller.admin_token))
        asyncio.run(Parent(plan, local, workers, logs, display).run())
    finally:
        claim.release()


def _launcher(name: str, local: LocalLauncher, logs: LogTails) -> tuple[Launcher, str]:
    """What starts workers, and the address at which they reach this machine."""
    if name == "local":
        return local, "127.0.0.1"
    from . import ray_launcher  # Ray is imported only where it is asked for

    workers = ray_launcher.make(logs)
    return workers, workers.host


def _log_files(log_dir: str) -> LogFiles:
    folder = Path(log_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"--log-dir: cannot make {folder}: {error.strerror}") from error
    return LogFiles(folder)
