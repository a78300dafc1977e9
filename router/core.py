"""The life of a request: placed on a pair of workers, followed token by token, tried again where a worker fails.

Pure: no I/O, no clock. The shell passes time in, feeds what workers say, and drains `Effects`; the simulator does
the same in virtual time.

    submit ──▶ waiting ──placed──▶ in flight ──Finished──▶ ended well
                  ▲                    │
                  └──── lost, refused ─┘   (bounded: losses, attempts, time to be placed, deadline) ──▶ failed

Each attempt has its own ticket, never used twice. A token counts only if its ticket is the request's current one and
its position the next; so whatever an abandoned attempt still says changes nothing, and the next attempt goes on
from the tokens so far.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from ..common.config import RouterConfig
from ..common.errors import (
    BatonError,
    DeadlineExceeded,
    HandoverFailed,
    NotReady,
    Overloaded,
    WorkerLost,
    from_code,
)
from ..common.messages import Cancel, Failed, Load, Resync, RouterMessage, StepReport, Submit, TokenOut
from ..common.types import FinishReason, Request, WorkerInfo
from . import moves
from .choose import Choice
from .fleet import Attempt, Worker
from .placement import Placement
from .request import MAX_BACKLOG, RequestState, Waiting
from .retry import RETRY_AFTER_S, blamed, exonerate, note, parting, suspect, suspected, verdict
from .stats import Limits, Snapshot, Stats

LOOK_AGAIN_S = 0.25
"""How often a request that finds no room looks again, beside the moments at which room appears."""
PLACED_AT_ONCE = 16
"""Waiting requests that one report may place: bounds the work of one report."""
OVERSLEPT_S = 1.0
"""A tick that comes this much after the last one says that this process slept, not that the workers were silent."""


@dataclass(slots=True)
class Effects:
    """What the shell has to do: messages to send in order, requests that have news, workers to disconnect."""

    sends: list[tuple[str, RouterMessage]] = field(default_factory=list)
    news: list[RequestState] = field(default_factory=list)
    disconnects: list[str] = field(default_factory=list)


class RouterCore:
    """`cluster_token` keys the block hashes; tickets count up from `first_ticket`."""

    def __init__(self, config: RouterConfig, cluster_token: str = "", first_ticket: int = 1) -> None:
        self.config = config
        self.stats = Stats()
        self._next_ticket = first_ticket
        self._placement = Placement(config, cluster_token)
        self._fleet = self._placement.fleet
        self._requests: dict[RequestState, None] = {}
        self._tickets: dict[int, RequestState] = {}
        self._waiting: dict[RequestState, Waiting] = {}  # in the order in which they began to wait
        self._last_tick = float("-inf")
        self._effects = Effects()

    # --- the consumer's side ---

    def submit(self, request: Request, now: float) -> RequestState:
        """Admit a request. Raises `Overloaded`, `NotReady` (nobody could serve it for longer than a request may wait)
        or `PromptTooLong`."""
        try:
            if len(self._requests) >= self.config.max_requests:
                raise Overloaded(f"{len(self._requests)} requests are here already", retry_after_s=RETRY_AFTER_S)
            self._placement.check(request, now)
        except BatonError as error:
            self.stats.failed[error.code] += 1
            raise
        state = RequestState(request, received=now, deadline=now + request.deadline_s)
        self.stats.arrived(request.prompt_len)
        self._requests[state] = None
        self._wait(state, now)
        self._place(state, now)
        return state

    def cancel(self, state: RequestState, now: float) -> None:
        """The consumer is gone: free everything at once. Idempotent."""
        if state.outcome is None:
            self._abandon(state)
            self._finish(state, FinishReason.CANCELLED)

    def close(self) -> None:
        """The router goes away: what is not done fails."""
        for state in list(self._requests):
            self._abandon(state)
            self._fail(state, NotReady("the router is shutting down", retry_after_s=RETRY_AFTER_S))

    def drain(self) -> Effects:
        """What has to be done since the last call."""
        effects, self._effects = self._effects, Effects()
        for state in effects.news:
            state.touched = False
        return effects

    # --- the workers' side ---

    def worker_up(self, info: WorkerInfo, now: float) -> None:
        """A session with this incarnation of a worker stands. It is usable from its first load report on."""
        self.worker_lost(info.ref.name, WorkerLost("a new session took its place"), now)
        self._placement.joined(Worker(info, heard=now))

    def worker_lost(self, name: str, why: BatonError, now: float) -> None:
        """The session broke or the worker fell silent: its requests go elsewhere. No error if it is not there."""
        if worker := self._placement.left(name):
            self.stats.losses += worker.usable or bool(worker.tickets)  # one that was to go, and is empty, is no loss
            self._move_away(worker, parting(worker, why), now)

    def set_draining(self, draining: Iterable[str], leaving: Iterable[str] = ()) -> None:
        """Exactly these workers take no new requests. What the first have, they finish; what the others have, moves."""
        self._fleet.mark(frozenset(draining), frozenset(leaving))

    def on_report(self, name: str, report: StepReport, now: float) -> None:
        """Take in what a worker says of one step."""
        worker = self._fleet.workers.get(name)
        if worker is None:
            return
        worker.heard = now
        for events in report.kv:
            if self._placement.index.apply(name, events):
                self.stats.resyncs += 1
                self._effects.sends.append((name, Resync()))
        for started in report.started:
            if (state := self._tickets.get(started.ticket)) and state.started(started.cached_tokens, now):
                self.stats.started(now - state.received, started.cached_tokens)
        self._take_tokens(name, report.tokens, now)
        for handed in report.handed_over:
            if (state := self._tickets.get(handed.ticket)) and state.attempt:
                if state.attempt.moving and name == state.attempt.decoder:
                    self._moved(state, state.attempt, now)
                else:
                    self._handed_over(state, state.attempt, now)
                    state.story.handed_over(state.attempt.decoder, handed.exposed_s, now)
        for stayed in report.stayed:
            if (state := self._tickets.get(stayed.ticket)) and state.attempt and name == state.attempt.decoder:
                self.stats.moves["stayed"] += 1
                state.attempt.moving, state.attempt.not_before = None, now + moves.TRY_AGAIN_S
        for finished in report.finished:
            if state := self._tickets.get(finished.ticket):
                if state.attempt and state.attempt.early:
                    self._again(state, HandoverFailed("it ended before all of it was here"), "", told=name, now=now)
                    continue
                if self.config.return_answers and (sent := moves.share_back(self._fleet, state, self._next_ticket)):
                    self._next_ticket += 1
                    self._effects.sends.append(sent)
                self._retire(state)
                self._finish(state, finished.reason)
        for failed in report.failed:
            self._failed(name, failed, now)
        if report.load is not None:
            self._loaded(worker, report.load, now)

    def tick(self, now: float) -> None:
        """Enforce leases, deadlines and waiting times. Call some 20 times a second."""
        overslept, self._last_tick = now - self._last_tick > OVERSLEPT_S, now
        for worker in list(self._fleet.workers.values()):
            if overslept:
                worker.heard = now
            if (silent := now - worker.heard) > self.config.lease_s:
                self.worker_lost(worker.name, WorkerLost(f"silent for {silent:.1f} s"), now)
                self._effects.disconnects.append(worker.name)
        self._placement.look(now)
        for state in [s for s in self._requests if now >= s.deadline]:
            self._abandon(state)
            self._fail(state, DeadlineExceeded(f"not done after {now - state.received:.1f} s"))
        for state in [s for s, waiting in self._waiting.items() if now >= waiting.next_try]:
            self._place(state, now)
        for state in moves.queued(self._fleet, self._tickets) if self.ready else ():
            self._abandon(state)
            self._wait(state, now)
            self._place(state, now)
        self._effects.sends += moves.due(self._fleet, self._tickets, now)

    # --- numbers ---

    @property
    def ready(self) -> bool:
        """Whether a usable pair is there now."""
        return self._placement.ready

    @property
    def limits(self) -> Limits | None:
        """What the fleet can take; None before the first worker."""
        return self._placement.limits

    def snapshot(self) -> Snapshot:
        """For metrics and people."""
        return Snapshot(
            workers=self._placement.snapshot(),
            running=len(self._tickets),
            waiting=len(self._waiting),
            index_entries=len(self._placement.index),
            stats=self.stats,
            oldest=next((state.received for state in self._requests if state.first_token is None), None),
        )

    # --- progress ---

    def _take_tokens(self, name: str, tokens: Iterable[TokenOut], now: float) -> None:
        """The hot path: one dictionary look-up and a few appends a token."""
        tickets, news = self._tickets, self._effects.news
        void: set[int] = set()
        for token in tokens:
            state = tickets.get(token.ticket)
            if state is None or state.attempt is None:
                void.add(token.ticket)
                continue
            gap = token.position - state.position
            if gap:
                if gap > 0 and not moves.ahead(state.attempt, name, token):
                    error = HandoverFailed(f"a token at {token.position} where {state.position} was next")
                    self._again(state, error, name, told=name, now=now)
                continue
            if not state.attempt.begun:
                self._begun(state, state.attempt, name, now)
            state.output.append(token.token)
            state.fresh.append(token)
            state.last_token = now
            self.stats.output_tokens += 1
            if not state.touched:
                state.touched = True
                news.append(state)
                exonerate(state, state.attempt)
                self._bound(state)
        # A Cancel may have come to a decode worker before the handover that it was to stop.
        self._effects.sends += [(name, Cancel(ticket)) for ticket in sorted(void)]

    def _begun(self, state: RequestState, attempt: Attempt, name: str, now: float) -> None:
        """The first token of an attempt is here."""
        self._fleet.begun(attempt)
        state.fingerprint = state.fingerprint or self._fleet.workers[name].info.fingerprint
        if state.begun(name, now):
            self.stats.ttft_s.add(now - state.received)
        if name == attempt.decode:
            self._handed_over(state, attempt, now)

    def _handed_over(self, state: RequestState, attempt: Attempt, now: float) -> None:
        if attempt.source and attempt.decode is not None:
            self._fleet.handed_over(attempt)
            if state.handover_done is None:
                state.handover_done = now

    def _moved(self, state: RequestState, attempt: Attempt, now: float) -> None:
        """The worker that it was moved from has said all that it had to say."""
        self.stats.moves["moved"] += 1
        early, attempt.early, left = attempt.early, [], attempt.decoder
        if target := moves.arrived(self._fleet, attempt):
            state.story.decodes(target.name, now, f"moved from {left}")
            self._take_tokens(target.name, early, now)
        else:
            gone = WorkerLost("the worker that it was moved to is gone")
            self._again(state, gone, "", told="", now=now)

    def _bound(self, state: RequestState) -> None:
        if len(state.fresh) > MAX_BACKLOG:
            self._abandon(state)
            self._fail(state, Overloaded(f"{len(state.fresh)} tokens lie unread"))

    def _loaded(self, worker: Worker, load: Load, now: float) -> None:
        worker.load = load
        stalled = load.loop_age_s > self.config.stall_s
        if stalled and not worker.stalled:
            worker.stalled = True
            self.stats.losses += 1
            error = WorkerLost(f"worker {worker.name}: its engine loop has not moved for {load.loop_age_s:.0f} s")
            self._move_away(worker, error, now)
        worker.stalled = stalled
        # Room may have appeared. The first that finds none ends the search: those behind it wait as well.
        for state in list(islice(self._waiting, PLACED_AT_ONCE)):
            if not self._place(state, now) and not suspect(state, self.config):
                break

    # --- failures ---

    def _failed(self, name: str, failed: Failed, now: float) -> None:
        state = self._tickets.get(failed.ticket)
        if state is None or state.attempt is None:
            return
        attempt = state.attempt
        if name != attempt.decoder and not attempt.source and not (attempt.moving and name == attempt.moving.name):
            return  # the decode worker has it: what becomes of the prefill worker's side does not matter
        error = from_code(failed.code, f"worker {name}: {failed.message}", RETRY_AFTER_S)
        if error.retryable:
            self._again(state, error, blamed(attempt, name, error), told=name, now=now)
        else:
            self._abandon(state, told=name)
            self._fail(state, error)

    def _move_away(self, worker: Worker, error: BatonError, now: float) -> None:
        for ticket in sorted(worker.tickets):
            self._again(self._tickets[ticket], error, worker.name, told="", now=now)

    def _again(self, state: RequestState, error: BatonError, culprit: str, told: str, now: float) -> None:
        """This attempt is over; make another, if that makes sense. `told`: the worker that knows that it is over."""
        self._abandon(state, told)
        self.stats.retries[error.code] += 1
        note(state, error, culprit, now)
        if state.complete:
            self._finish(state, FinishReason.LENGTH)
        elif final := verdict(state, error, self.config):
            self._fail(state, final)
        else:
            self._wait(state, now)
            self._place(state, now)

    # --- placing ---

    def _wait(self, state: RequestState, now: float) -> None:
        self._waiting[state] = Waiting(since=now, next_try=now)
        state.story.waits(now)

    def _place(self, state: RequestState, now: float) -> bool:
        """Send a waiting request to the best pair. False: nobody has room, and it waits on, or its time is up."""
        waiting = self._waiting[state]
        avoid = suspected(self._tickets.values(), self.config) if suspect(state, self.config) else set()
        if choice := self._placement.pick(state, now, avoid):
            del self._waiting[state]
            state.waited_s += now - waiting.since
            self._send_out(state, choice, now)
            return True
        waiting.next_try = min([now + LOOK_AGAIN_S, *state.excluded.values()])
        if state.waited_s + now - waiting.since > self.config.place_timeout_s:
            full = self._placement.ready
            why = f"no worker {'had room' if full else 'was there'} for {self.config.place_timeout_s:.0f} s"
            self._fail(state, (Overloaded if full else NotReady)(why, retry_after_s=RETRY_AFTER_S))
        return False

    def _send_out(self, state: RequestState, choice: Choice, now: float) -> None:
        source, target = choice.prefill.info, choice.decode.info if choice.decode else None
        decoder = choice.decode or choice.prefill
        attempt = Attempt(
            self._next_ticket, source.ref.name, target.ref.name if target else None, choice.uncached,
            -(-state.position // decoder.info.block_size), len(state.output),
        )  # fmt: skip
        self._next_ticket += 1
        self._fleet.charge(attempt)
        self._tickets[attempt.ticket] = state
        state.placed(attempt, choice.reason, now)
        state.ceiling = min(choice.prefill.longest, decoder.longest)
        self.stats.decisions[choice.reason] += 1
        self.stats.prefix_hit_tokens += choice.cached
        self.stats.routed_tokens += state.position
        submit = Submit(attempt.ticket, state.attempts, state.so_far(now), target.ref if target else None)
        self._effects.sends.append((attempt.prefill, submit))

    # --- ends ---

    def _retire(self, state: RequestState) -> list[str]:
        """The current ticket, if there is one, counts no more. Returns the workers that still held it."""
        attempt, state.attempt = state.attempt, None
        if attempt is None:
            return []
        del self._tickets[attempt.ticket]
        state.chains.clear()  # the tokens have grown since they were hashed
        return self._fleet.release(attempt)

    def _abandon(self, state: RequestState, told: str = "") -> None:
        """Retire the current ticket and tell the workers that hold it, but for the one that knows."""
        attempt = state.attempt
        if attempt is None:
            return
        holders = self._retire(state)
        if attempt.moving is not None and attempt.moving.name in self._fleet.workers:
            holders.append(attempt.moving.name)
        self._effects.sends += [(name, Cancel(attempt.ticket)) for name in holders if name != told]

    def _finish(self, state: RequestState, reason: FinishReason) -> None:
        self.stats.finished[reason.value] += 1
        state.outcome = state.finish(reason)
        self._ended(state)

    def _fail(self, state: RequestState, error: BatonError) -> None:
        self.stats.failed[error.code] += 1
        state.outcome = error
        self._ended(state)

    def _ended(self, state: RequestState) -> None:
        if (pace := state.pace) is not None:
            self.stats.tpot_s.add(pace)
        self._waiting.pop(state, None)
        del self._requests[state]
        if not state.touched:
            state.touched = True
            self._effects.news.append(state)
