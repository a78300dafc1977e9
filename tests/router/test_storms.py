"""Storms: losses, refusals, duplicates, late words of dead sessions and reorderings, in every order hypothesis finds.

Whatever happens, each request ends exactly once, its tokens are the oracle's, in order and without a gap or a repeat,
and nothing is left in any table: neither in the router's nor in a worker's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common.errors import BatonError, WorkerLost
from baton.common.messages import Cancel, Failed, Finished, HandedOver, KvEvents, Started, StepReport, Submit, Tokens
from baton.common.types import FinishReason, Request, Role
from baton.router.request import Finish, RequestState
from tests.fake_worker import expected, oracle
from tests.router.fakes import Driver, info, load, request

ROLES = {"p": Role.PREFILL, "q": Role.PREFILL, "d": Role.DECODE, "e": Role.DECODE, "c": Role.COLOCATED}
CODES = ("pool_full", "worker_lost", "handover_failed", "engine_failure", "stale_epoch")


@dataclass(eq=False)
class Node:
    """A worker of the storm: acts only when told to, on messages in order."""

    name: str
    epoch: int = 1
    inbox: deque[object] = field(default_factory=deque)
    prefilling: dict[int, Submit] = field(default_factory=dict)
    decoding: dict[int, tuple[Request, int]] = field(default_factory=dict)
    said: list[StepReport] = field(default_factory=list)


class World:
    """A core, five nodes and the wires between them."""

    def __init__(self) -> None:
        self.driver = Driver(max_losses=1000, max_attempts=1000, place_timeout_s=1e6, lease_s=1e6)
        self.nodes = {name: Node(name) for name in ROLES}
        self.states: list[RequestState] = []
        self.got: dict[RequestState, list[int]] = {}
        self.ends: dict[RequestState, int] = {}
        for node in self.nodes.values():
            self.connect(node)

    def connect(self, node: Node) -> None:
        self.driver.core.worker_up(info(node.name, ROLES[node.name], node.epoch), self.driver.now)
        self.say(node, StepReport(load=load(), kv=(KvEvents(0, reset=True),)))

    def say(self, node: Node, report: StepReport) -> None:
        node.said.append(report)
        self.driver.core.on_report(node.name, report, self.driver.now)
        self.pump()

    def pump(self) -> None:
        """Carry what the core sends to the nodes, and read what it has for the consumers."""
        effects = self.driver.core.drain()
        for name, message in effects.sends:
            self.nodes[name].inbox.append(message)
        for state in effects.news:
            if isinstance(state.outcome, BatonError):
                self.got[state] += [token.token for token in state.fresh]
                state.fresh = []
            else:
                self.got[state] += [token.token for token in state.take().tokens]
            self.ends[state] += state.outcome is not None

    # --- what a storm does ---

    def submit(self, length: int, max_tokens: int) -> None:
        state = self.driver.core.submit(request(range(1, length + 2), max_tokens + 1), self.driver.now)
        self.states.append(state)
        self.got[state], self.ends[state] = [], 0
        self.pump()

    def cancel(self, which: int) -> None:
        if self.states:
            self.driver.core.cancel(self.states[which % len(self.states)], self.driver.now)
            self.pump()

    def work(self, node: Node, how: int) -> None:
        """Read one message; or move one request on by a stage or a token."""
        if node.inbox and how % 3:
            match node.inbox.popleft():
                case Submit() as submit:
                    node.prefilling[submit.ticket] = submit
                case Cancel(ticket):
                    node.prefilling.pop(ticket, None)
                    node.decoding.pop(ticket, None)
        elif node.prefilling:
            self.prefilled(node, node.prefilling.pop(min(node.prefilling)), late=how % 2 == 1)
        elif node.decoding:
            self.decode(node, sorted(node.decoding)[how % len(node.decoding)])

    def prefilled(self, node: Node, submit: Submit, late: bool) -> None:
        ticket = submit.ticket
        started = (Started(ticket, 0),)
        if submit.decode is None:
            node.decoding[ticket] = (submit.request, len(submit.request.tokens))
            self.say(node, StepReport(started=started))
            return
        target = self.nodes[submit.decode.name]
        if target.epoch != submit.decode.epoch:
            self.say(node, StepReport(started=started, failed=(Failed(ticket, "stale_epoch", "gone"),)))
            return
        target.decoding[ticket] = (submit.request, len(submit.request.tokens))
        if late:
            self.decode(target, ticket)
        self.say(node, StepReport(started=started, handed_over=(HandedOver(ticket),)))

    def decode(self, node: Node, ticket: int) -> None:
        req, position = node.decoding.pop(ticket)
        out = Tokens([ticket], [position], [oracle(req.tokens[: req.prompt_len], position)])
        if position + 1 - req.prompt_len >= req.params.max_tokens:
            self.say(node, StepReport(tokens=out, finished=(Finished(ticket, FinishReason.LENGTH),)))
        else:
            node.decoding[ticket] = (req, position + 1)
            self.say(node, StepReport(tokens=out))

    def refuse(self, node: Node, how: int) -> None:
        """Give up whatever this node holds first."""
        for held in (node.prefilling, node.decoding):
            if held:
                ticket = min(held)
                del held[ticket]
                self.say(node, StepReport(failed=(Failed(ticket, CODES[how % len(CODES)], "storm"),)))
                return

    def die(self, node: Node, how: int) -> None:
        """The session breaks: a worker drops what that router's requests held, and comes back as another incarnation,
        or as the same one (only the connection broke)."""
        node.inbox.clear()
        node.prefilling.clear()
        node.decoding.clear()
        node.epoch += how % 2
        self.driver.core.worker_lost(node.name, WorkerLost("storm"), self.driver.now)
        self.pump()
        if how % 4 < 2:
            self.connect(node)

    def repeat(self, node: Node, how: int) -> None:
        """Something that was said before, perhaps by another incarnation, arrives again."""
        report = node.said[-1 - how % min(4, len(node.said))]
        again = StepReport(report.tokens, (), report.handed_over, report.finished)
        self.driver.core.on_report(node.name, again, self.driver.now)
        self.pump()

    def pass_time(self, seconds: float) -> None:
        self.driver.now += seconds
        self.driver.core.tick(self.driver.now)
        self.pump()

    def heal(self) -> None:
        """The storm is over: everybody is there and works until nothing is left to do."""
        for node in self.nodes.values():
            if node.name not in self.driver.core._fleet.workers:
                self.connect(node)
        for _ in range(3000):
            busy = any(node.inbox or node.prefilling or node.decoding for node in self.nodes.values())
            if not busy and all(state.outcome is not None for state in self.states):
                break
            self.pass_time(0.3)
            for node in self.nodes.values():
                self.work(node, 1 if node.inbox else 0)


OPS = ("submit", "cancel", "work", "work", "work", "work", "refuse", "die", "repeat", "time")
script = st.lists(
    st.tuples(st.sampled_from(OPS), st.sampled_from(sorted(ROLES)), st.integers(0, 11)), min_size=30, max_size=150
)


@settings(max_examples=200, deadline=None)
@given(script)
def test_every_request_ends_once_with_the_oracles_tokens_and_nothing_is_left(ops: list[tuple[str, str, int]]) -> None:
    world = World()
    world.submit(3, 4)
    for op, name, how in ops:
        node = world.nodes[name]
        match op:
            case "submit":
                world.submit(how, how % 5)
            case "cancel":
                world.cancel(how)
            case "work":
                world.work(node, how)
            case "refuse":
                world.refuse(node, how)
            case "die":
                world.die(node, how)
            case "repeat":
                world.repeat(node, how)
            case "time":
                world.pass_time(how / 10)
    world.heal()
    for state in world.states:
        assert world.ends[state] == 1
        outcome = state.outcome
        assert isinstance(outcome, Finish)
        whole = expected(state.request)
        if outcome.reason is FinishReason.CANCELLED:
            assert world.got[state] == whole[: len(world.got[state])]
        else:
            assert world.got[state] == whole
        assert outcome.usage.completion_tokens == len(world.got[state])
    stats = world.driver.core.stats
    assert stats.submitted == len(world.states) == stats.finished.total() + stats.failed.total()
    world.driver.assert_empty()
    for node in world.nodes.values():
        assert (node.prefilling, node.decoding) == ({}, {})
