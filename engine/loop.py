"""The loop of a worker: drain the inbox, plan, compute, tell. Everything else is a role's policy.

A round either waits for the step that it has launched, or for the one before it, while the device computes:

    plain        device                   ─── n ────                             ── n+1 ───
                 host     plan, launch n │ wait     │ tell n · plan, launch n+1 │ wait     │ tell n+1
    overlapped   device   ──────────────── n ────────────────│────────────── n+1 ───────────────│── n+2
                 host     plan, launch n+1 · tell n-1 · wait │ plan, launch n+2 · tell n · wait │ plan

So an overlapped step is planned when nobody knows yet what the step before it draws (`Sequence.pending`): a sequence
that ends by its length is not planned past it, one that ends by a stop token has a row too many in the step that
is under way, which is thrown away. And it tells when it is about to wait: the other thread's part of the work then has
the interpreter for itself. (The order of things is that of SGLang's zero-overhead scheduler and of NanoFlow,
OSDI '25.)
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from ..common.clock import Clock
from ..common.errors import EngineBroken, EngineFailure
from ..common.messages import CheckReport, KvEvents, Load, Resync
from .block_manager import BlockLeak
from .block_table import Flight
from .mailbox import FromRouter, Inbox, Inspect, Mail, Recast, RouterGone, RouterJoined
from .plan import Launched, Runner, StepPlan
from .role import Context, Role
from .sequence import Sequence

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.05
"""How long an idle loop sleeps at most before it looks at leases and deadlines again."""

MAX_FAILURES = 3
"""Steps that may fail one after the other before the loop gives up and the process ends."""


Shares = Listing[tuple[Role, range, range]]


@dataclass(frozen=True, slots=True)
class _Step:
    """A step from its plan to its end. `shares`: who planned which of its decodes and slices; `begun` is when it was
    launched."""

    plan: StepPlan
    shares: Shares
    flight: Flight
    begun: float

    def left(self) -> Iterator[tuple[Role, list[Sequence], Listing[int]]]:
        """The shares, without those that are gone: sequences, and their places in the step's results."""
        plan, gone = self.plan, self.flight.gone
        for role, decodes, slices in self.shares:
            sequences = plan.decodes if decodes else []  # one planner fills them
            rows: Listing[int] = decodes
            if slices:
                sequences = [*sequences, *[plan.slices[i].sequence for i in slices]]
                rows = [*decodes, *[len(plan.decodes) + i for i in slices]]
            if gone:
                rows = [row for row, sequence in zip(rows, sequences, strict=True) if sequence not in gone]
                sequences = [sequence for sequence in sequences if sequence not in gone]
            if sequences:
                yield role, sequences, rows


class EngineLoop:
    """Owns the block table and the order of things. `deliver` takes each round's mail to the RPC side. `overlap`: plan
    and launch a step while the one before it computes, which pays where the device is not this processor.

    Torch-free: the real runner computes, the simulator's only counts, and both run under this same loop.
    """

    def __init__(
        self, context: Context, roles: Listing[Role], runner: Runner, inbox: Inbox, clock: Clock,
        deliver: Callable[[Mail], None], overlap: bool = False,
    ) -> None:  # fmt: skip
        self.context = context
        self.inbox = inbox
        self.roles = roles
        self._runner = runner
        self._clock = clock
        self._deliver = deliver
        self._kv_seq = 0
        self._round = self._overlapped_round if overlap else self._plain_round
        self._running: list[tuple[_Step, Launched]] = []  # launched and not collected, in this order: two at most
        self._collected = 0.0
        self._failures = 0
        self._recasts: list[Recast] = []
        self.last_round = clock.now()
        self.last_load = self.load()
        """For heartbeats, on any thread: a round that only frees something changes the load and has nothing to say."""

    def run(self, stop: threading.Event) -> None:
        """Go round until `stop` is set. Raises `EngineFailure` after `MAX_FAILURES` failed steps in a row, or after one
        that breaks the engine."""
        while not stop.is_set():
            if not self.step():
                self.inbox.wait(IDLE_WAIT_S)

    def step(self) -> bool:
        """One round; whether anything was computed."""
        now = self.last_round = self._clock.now()
        for item in self.inbox.drain():
            match item:
                case Inspect(reply):
                    reply(self.inspect())
                case Recast():
                    self._recasts.append(item)
                case RouterJoined(router):
                    self.context.outbox.routers.add(router)
                    self._tell_cache(router)
                case FromRouter(router, Resync()):
                    self._tell_cache(router)
                case _:
                    if isinstance(item, RouterGone):
                        self.context.outbox.routers.discard(item.router)
                    for role in self.roles:
                        role.receive(item, now)
        for role in self.roles:
            role.tick(now)
        computed = self._round(now)
        if not self._running:  # else the next round, which follows at once, tells what this one has found
            self._tell()
        if self._recasts:  # last: what the old role had to say is on its way
            self._recast(now)
        return computed

    def _recast(self, now: float) -> None:
        """Between two roles nothing may be held: the one would not know what the other has begun."""
        held = bool(self._running) or any(role.waiting or role.running or role.handovers for role in self.roles)
        for recast in [r for r in self._recasts if not held or now >= r.until]:
            self._recasts.remove(recast)
            if in_time := now < recast.until:  # who slept over it does not do it late: nobody expects it any more
                self.roles = recast.cast()
            recast.reply(in_time)

    # --- a round's step ---

    def _plain_round(self, now: float) -> bool:
        """Plan a step, have it computed, and see what it drew."""
        plan, shares = self._plan(now)
        if plan:
            self._tell()  # what the plan has to say need not wait for the step
            if self._launch(plan, shares):
                self._collect()
        return bool(plan)

    def _overlapped_round(self, now: float) -> bool:
        """While the step before computes, plan one and launch it behind that; then see what that one drew."""
        under_way = bool(self._running)
        plan, shares = self._plan(now)
        if plan.short:
            self._tell()
            self._collect()
            plan, shares = self._plan(now)
        if plan.slices:  # it is launched kernel by kernel, which takes a while
            self._tell()
        if plan:
            self._launch(plan, shares)
        self._tell()
        if len(self._running) > bool(plan):
            self._collect()
        return under_way or bool(plan)

    def _plan(self, now: float) -> tuple[StepPlan, Shares]:
        """A step, and who planned what of it."""
        plan = StepPlan(self.context.limits.max_batch_tokens, ahead=bool(self._running))
        shares = []
        for role in self.roles:
            decodes, slices = len(plan.decodes), len(plan.slices)
            role.plan(plan, now)
            shares.append((role, range(decodes, len(plan.decodes)), range(slices, len(plan.slices))))
            if plan.short:
                break
        return plan, shares

    def _launch(self, plan: StepPlan, shares: Shares) -> bool:
        """Give a step to the runner; whether it took it."""
        step = _Step(plan, shares, self.context.table.launch(plan), self._clock.now())
        try:
            self._running.append((step, self._runner.launch(plan, self._on_layer)))
        except EngineFailure as error:
            if self._running:  # what runs already may well end
                self._collect()
            self._fail([step], error)
            return False
        return True

    def _collect(self) -> None:
        """Wait for the oldest step that runs, and pass on what it drew."""
        step, launched = self._running[0]
        try:
            results = launched.results()
        except EngineFailure as error:
            for _, later in self._running[1:]:  # it goes on from what has failed
                if not isinstance(error, EngineBroken):  # waited for, because it writes blocks that others get
                    with contextlib.suppress(EngineFailure):
                        later.results()
            failed = [step for step, _ in self._running]
            self._running.clear()
            self._fail(failed, error)
            return
        del self._running[0]
        self._failures = 0
        done = self._clock.now()
        self.context.stats.step(step.plan, done - max(step.begun, self._collected))
        self._collected = done
        self.context.table.computed(step.plan)
        for role, sequences, rows in step.left():
            role.computed(sequences, results.pick(rows), done)
        self.context.table.end()

    def _on_layer(self, layer: int) -> None:
        for role in self.roles:
            role.on_layer(layer)

    def _fail(self, steps: list[_Step], error: EngineFailure) -> None:
        """These have failed, and nothing else is under way."""
        self._failures += 1
        log.error("step failed (%d in a row): %s", self._failures, error)
        for step in steps:
            for role, sequences, _ in step.left():
                for sequence in sequences:
                    role.failed(sequence, error)
        for _ in steps:
            self.context.table.end()
        if isinstance(error, EngineBroken):
            self._tell()
            raise error
        if self._failures >= MAX_FAILURES:
            self._tell()
            raise EngineFailure(f"{MAX_FAILURES} steps failed in a row; the last: {error}")

    # --- telling ---

    def _tell(self) -> None:
        self._tell_changes()
        self.last_load = self.load()
        if mail := self.context.outbox.flush(self.last_load):
            self._deliver(mail)

    def _tell_cache(self, router: str) -> None:
        self._tell_changes()  # what others are owed comes first, so that one number stands for one state
        self.context.outbox.kv(router, KvEvents(self._kv_seq, self.context.table.manager.hashes(), reset=True))

    def _tell_changes(self) -> None:
        stored, evicted = self.context.table.manager.drain_events()
        if stored or evicted:
            self._kv_seq += 1
            for router in self.context.outbox.routers:
                self.context.outbox.kv(router, KvEvents(self._kv_seq, stored, evicted))

    def load(self) -> Load:
        """How busy this worker is now."""
        manager, stats = self.context.table.manager, self.context.stats
        waiting = running = queued = reserved = 0
        for role in self.roles:
            waiting += role.waiting
            running += role.running
            queued += role.queued_tokens
            reserved += role.reserved_blocks
        return Load(
            waiting=waiting,
            running=running,
            queued_prefill_tokens=queued,
            total_blocks=manager.num_blocks,
            free_blocks=manager.free,
            cached_blocks=manager.cached,
            reserved_blocks=reserved,
            prefill_tokens_per_s=stats.prefill_tokens_per_s,
            decode_step_s=stats.decode_step_s,
            decode_batch=stats.decode_batch,
            steps=stats.steps,
            preemptions=stats.preemptions,
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            output_tokens=stats.output_tokens,
            handovers=stats.handovers,
            handover_bytes=stats.handover_bytes,
            handover_seconds=stats.handover_seconds,
            handover_exposed_seconds=stats.handover_exposed_seconds,
            handover_skipped_blocks=stats.handover_skipped_blocks,
            handover_aborts=tuple(sorted(stats.handover_aborts.items())),
            moves=stats.moves,
            shared_tokens=stats.shared_tokens,
        )

    def inspect(self) -> CheckReport:
        """Prove the books: every block has exactly the owners that are known, every holder belongs to a role."""
        manager, problem = self.context.table.manager, ""
        try:
            self.context.table.check()
            held = {s.key for s in self.context.table.holders()}
            known = {s.key for role in self.roles for s in role.sequences()}
            if held - known:
                raise BlockLeak(f"blocks are held by sequences that no role knows: {sorted(held - known)}")
        except BlockLeak as leak:
            problem = str(leak)
        return CheckReport(
            ok=not problem,
            problem=problem,
            total_blocks=manager.num_blocks,
            free_blocks=manager.free,
            cached_blocks=manager.cached,
            pinned_blocks=manager.pinned,
            reserved_blocks=sum(role.reserved_blocks for role in self.roles),
            sequences=sum(role.waiting + role.running for role in self.roles),
            handovers=sum(role.handovers for role in self.roles),
            preemptions=self.context.stats.preemptions,
        )
