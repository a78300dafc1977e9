"""A cluster's admin API as commands see it: a small real HTTP server that answers what a test tells it to."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from baton.common.json_form import to_json
from baton.common.messages import Load
from baton.deploy.control.status import ClusterStatus, Decision, Event, GatewayRow, PoolRow, TrafficRow, WorkerRow
from baton.deploy.launch.runfile import RunFile

TOKEN = "operators-only"

STATUS = ClusterStatus(
    model="demo",
    launcher="local",
    revision=3,
    controller_age_s=7300.0,
    autoscale=True,
    rollout="",
    pools=(
        PoolRow(name="prefill", role="prefill", tp=1, wanted=1, ready=1),
        PoolRow(name="decode", role="decode", tp=2, wanted=2, ready=2),
    ),
    workers=(
        WorkerRow(
            name="prefill-0",
            pool="prefill",
            role="prefill",
            state="ready",
            revision=3,
            age_s=60.0,
            load=Load(waiting=2, total_blocks=100, free_blocks=50, cached_blocks=25, prompt_tokens=10, cached_tokens=4),
            prompt_tokens_per_s=5300.0,
        ),
        WorkerRow(name="decode-0", pool="decode", role="decode", state="ready", revision=3, load=Load(running=7)),
        WorkerRow(name="decode-1", pool="decode", role="decode", state="ready", revision=3, restarts=2, detail="[oom]"),
    ),
    gateways=(GatewayRow(name="gateway-0", url="http://127.0.0.1:8000", state="serving", running=7, waiting=2),),
    traffic=TrafficRow(requests_per_s=12.5, ttft_p50_s=0.25, ttft_p99_s=1.5, tpot_p50_s=0.004),
    events=(Event(number=1, ago_s=4.0, level="warning", text="decode-1 ended (exit code 1)"),),
    why=(Decision(ago_s=30.0, text="turned decode-1 to prefill: queue p90 4.1 s"),),
)


def pools(**sizes: tuple[int, int]) -> ClusterStatus:
    """`STATUS` with these pools alone: (ready, wanted) workers each, those that are ready as rows."""
    rows = [
        WorkerRow(name=f"{name}-{index}", pool=name, role=name, state="ready", revision=3)
        for name, (ready, _) in sizes.items()
        for index in range(ready)
    ]
    table = (PoolRow(name=n, role=n, tp=1, ready=ready, wanted=wanted) for n, (ready, wanted) in sizes.items())
    return replace(STATUS, pools=tuple(table), workers=tuple(rows))


@dataclass(slots=True)
class FakeAdmin:
    """`answers`: what each "METHOD path" is answered with: (HTTP status, body). `statuses`: what the status is, one
    after the other, the last for ever; `after` is called with each operation. `calls`: what was asked, and its body."""

    url: str = ""
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    statuses: list[ClusterStatus] = field(default_factory=lambda: [STATUS])
    after: Callable[[str], None] = lambda _: None
    calls: list[tuple[str, Any]] = field(default_factory=list)

    def then(self, *statuses: ClusterStatus) -> None:
        """From the next operation on, the status is this, one after the other."""

        def switch(_: str) -> None:
            self.statuses = list(statuses)

        self.after = switch

    def refuse(self, call: str, status: int, message: str) -> None:
        self.answers[call] = (status, {"error": {"code": "refused", "message": message, "param": None}})

    def answer(self, call: str, body: Any, token: str) -> tuple[int, Any]:
        self.calls.append((call, body))
        if token != f"Bearer {TOKEN}":
            return 401, {"error": {"code": "invalid_api_key", "message": "wrong token", "param": None}}
        if call in self.answers:
            return self.answers[call]
        if call == "GET /v1/status":
            return 200, self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        self.after(call)
        return 200, {"steps": ["start prefill-1"]} if call == "POST /v1/scale" else {}


@contextlib.contextmanager
def serving() -> Iterator[FakeAdmin]:
    """On a free port of this machine, until the end of the block."""
    fake = FakeAdmin()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(f"GET {self.path}", None)

        def do_POST(self) -> None:
            self._reply(f"POST {self.path}", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, call: str, body: Any) -> None:
            status, answer = fake.answer(call, body, self.headers.get("Authorization", ""))
            data = answer if isinstance(answer, bytes) else to_json(answer)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing: calls are kept."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def publish(folder: Path, name: str, url: str, pid: int = 0) -> None:
    """Write the run file of a cluster; without a `pid`, its parent is this process."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_bytes(to_json(RunFile(name, pid or os.getpid(), url, TOKEN)))
