"""Values and a driver for tests of the pure parts of the router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.common.config import RouterConfig
from baton.common.errors import WorkerLost
from baton.common.messages import Cancel, KvEvents, Load, StepReport, Submit, TokenOut, Tokens
from baton.common.types import FinishReason, Request, Role, SamplingParams, WorkerInfo, WorkerRef
from baton.router.core import RouterCore
from baton.router.fleet import Worker
from baton.router.request import Finish, RequestState

KV_BYTES = 1000
LENGTH, STOP, CANCELLED = FinishReason.LENGTH, FinishReason.STOP, FinishReason.CANCELLED


def info(name: str, role: Role = Role.COLOCATED, epoch: int = 1, fingerprint: str = "f", **rest: Any) -> WorkerInfo:
    values = {"block_size": 4, "total_blocks": 1000, "max_model_len": 1000, "kv_bytes_per_token": KV_BYTES} | rest
    return WorkerInfo(WorkerRef(name, f"addr-{name}", epoch), role, fingerprint, "model", vocab_size=1000, **values)


def load(**rest: Any) -> Load:
    values = {"total_blocks": 1000, "free_blocks": 1000, "prefill_tokens_per_s": 1000.0, "decode_step_s": 0.01} | rest
    return Load(**values)


def worker(name: str, role: Role = Role.COLOCATED, load_: Load | None = None, **rest: Any) -> Worker:
    return Worker(info(name, role, **rest), heard=0.0, load=load_ or load())


def request(
    tokens: Sequence[int] = (1, 2, 3), max_tokens: int = 4, name: str = "r", deadline_s: float = 600.0
) -> Request:
    return Request(name, tuple(tokens), len(tokens), SamplingParams(max_tokens=max_tokens), deadline_s=deadline_s)


class Driver:
    """A core, its time, and what it has sent. Nobody answers but the test."""

    def __init__(self, **config: Any) -> None:
        self.core = RouterCore(RouterConfig(**config))
        self.now = 100.0
        self.sent: list[tuple[str, object]] = []
        self.news: list[RequestState] = []
        self.disconnected: list[str] = []

    def up(self, name: str, role: Role = Role.COLOCATED, load_: Load | None = None, **rest: Any) -> None:
        self.core.worker_up(info(name, role, **rest), self.now)
        self.report(name, load=load_ or load(), kv=(KvEvents(0, reset=True),))
        self.tick()

    def report(self, worker_name: str, **rest: Any) -> None:
        self.core.on_report(worker_name, StepReport(**rest), self.now)
        self.drain()

    def tokens(self, worker_name: str, ticket: int, start: int, *tokens: int, **rest: Any) -> None:
        out = Tokens.of(TokenOut(ticket, start + i, token) for i, token in enumerate(tokens))
        self.report(worker_name, tokens=out, **rest)

    def submit(self, *args: Any, **kwargs: Any) -> RequestState:
        state = self.core.submit(request(*args, **kwargs), self.now)
        self.drain()
        return state

    def lose(self, name: str) -> None:
        self.core.worker_lost(name, WorkerLost("gone"), self.now)
        self.drain()

    def wait(self, seconds: float, silent: bool = False) -> None:
        """Let time pass in ticks, with every worker sending its heartbeat, or none."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.05
            for name in [] if silent else list(self.core._fleet.workers):
                self.core.on_report(name, StepReport(), self.now)
            self.tick()

    def tick(self) -> None:
        self.core.tick(self.now)
        self.drain()

    def drain(self) -> None:
        effects = self.core.drain()
        self.sent += effects.sends
        self.news += effects.news
        self.disconnected += effects.disconnects

    def take(self) -> list[tuple[str, object]]:
        sent, self.sent = self.sent, []
        return sent

    def submits(self) -> list[tuple[str, Submit]]:
        """Submits sent since the last call, and nothing else was."""
        sent = self.take()
        found = [(name, message) for name, message in sent if isinstance(message, Submit)]
        assert len(found) == len(sent), sent
        return found

    def submitted(self) -> tuple[str, Submit]:
        (only,) = self.submits()
        return only

    def assert_empty(self) -> None:
        """No trace of any request is left, in any table or book."""
        core = self.core
        assert not core._requests and not core._tickets and not core._waiting
        for w in core._fleet.workers.values():
            assert (w.tickets, w.own_tokens, w.own_blocks, w.own_batch) == (set(), 0, 0, 0), w


def tokens_of(state: RequestState) -> list[int]:
    return [token.token for token in state.fresh]


def finish_of(state: RequestState) -> Finish:
    assert isinstance(state.outcome, Finish), state.outcome
    return state.outcome


def cancels(sent: list[tuple[str, object]]) -> list[tuple[str, int]]:
    return [(name, message.ticket) for name, message in sent if isinstance(message, Cancel)]
