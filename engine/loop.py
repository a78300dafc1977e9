"""The loop of a worker: drain the inbox, plan, compute, tell. Everything else is a role's policy."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from ..common.clock import Clock
from ..common.errors import EngineBroken, EngineFailure
from ..common.messages import CheckReport, KvEvents, Load, Resync
from .block_manager import BlockLeak
from .mailbox import FromRouter, Inbox, Inspect, Mail, Recast, RouterGone, RouterJoined
from .plan import Runner, Slice, StepPlan
from .role import Context, Role

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.05
"""How long an idle loop sleeps at most before it looks at leases and deadlines again."""

MAX_FAILURES = 3
"""Steps that may fail one after the other before the loop gives up and the process ends."""

OUTLIER = 2.0
"""A decode step counts for at most this many times what steps took before."""


class EngineLoop:
    """Owns the block table and the order of things. `deliver` takes each round's mail to the RPC side.

    Torch-free: the real runner computes, the simulator's only counts, and both run under this same loop.
    """

    def __init__(
        self, context: Context, roles: Sequence[Role], runner: Runner, inbox: Inbox, clock: Clock,
        deliver: Callable[[Mail], None],
    ) -> None:  # fmt: skip
        self.context = context
        self.inbox = inbox
        self.roles = roles
        self._runner = runner
        self._clock = clock
        self._deliver = deliver
        self._kv_seq = 0
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
        """One round; whether it computed anything."""
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
        computed = self._compute(now)
        self._tell_changes()
        self._tell()
        if self._recasts:  # last: what the old role had to say is on its way
            self._recast(now)
        return computed

    def _recast(self, now: float) -> None:
        """Between two roles nothing may be held: the one would not know what the other has begun."""
        held = any(role.waiting or role.running or role.handovers for role in self.roles)
        for recast in [r for r in self._recasts if not held or now >= r.until]:
            self._recasts.remove(recast)
            if in_time := now < recast.until:  # who slept over it does not do it late: nobody expects it any more
                self.roles = recast.cast()
            recast.reply(in_time)

    def _compute(self, now: float) -> bool:
        plan = StepPlan(self.context.limits.max_batch_tokens)
        owners: list[Role] = []
        for role in self.roles:
            role.plan(plan, now)
            owners += [role] * (len(plan.slices) - len(owners))
        if not plan.slices:
            return False
        self._tell()  # what the plan has to say need not wait for the step
        try:
            results = self._runner.launch(plan, self._on_layer).results()
        except EngineFailure as error:
            self._fail(plan, owners, error)
            return True
        self._failures = 0
        done = self._clock.now()
        self._measure(plan, done - now)
        for part, owner, sampled in zip(plan.slices, owners, results, strict=True):
            self.context.table.advance(part.sequence, part.count)
            owner.computed(part, sampled, done)
        return True

    def _on_layer(self, layer: int) -> None:
        for role in self.roles:
            role.on_layer(layer)

    def _fail(self, plan: StepPlan, owners: list[Role], error: EngineFailure) -> None:
        self._failures += 1
        log.error("step failed (%d in a row): %s", self._failures, error)
        for part, owner in zip(plan.slices, owners, strict=True):
            owner.failed(part, error)
        if isinstance(error, EngineBroken):
            self._tell()
            raise error
        if self._failures >= MAX_FAILURES:
            self._tell()
            raise EngineFailure(f"{MAX_FAILURES} steps failed in a row; the last: {error}")

    # --- telling ---

    def _tell(self) -> None:
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

    def _measure(self, plan: StepPlan, seconds: float) -> None:
        stats = self.context.stats
        stats.steps += 1
        chunk = sum(part.count for part in plan.slices if not _decodes(part))
        if chunk >= 32:  # smaller chunks say more about overheads than about the rate
            stats.prefill_tokens_per_s = _smooth(stats.prefill_tokens_per_s, chunk / max(seconds, 1e-9))
        elif chunk == 0:
            # A step in which the process was stopped or starved says nothing of the next ones; taken at its word, it
            # would keep the router away, and with it the steps that tell better.
            most = OUTLIER * stats.decode_step_s or seconds
            stats.decode_step_s = _smooth(stats.decode_step_s, min(seconds, most))
            stats.decode_batch = _smooth(stats.decode_batch, len(plan.slices))

    def load(self) -> Load:
        """How busy this worker is now."""
        manager, stats = self.context.table.manager, self.context.stats
        return Load(
            waiting=sum(role.waiting for role in self.roles),
            running=sum(role.running for role in self.roles),
            queued_prefill_tokens=sum(role.queued_tokens for role in self.roles),
            total_blocks=manager.num_blocks,
            free_blocks=manager.free,
            cached_blocks=manager.cached,
            reserved_blocks=sum(role.reserved_blocks for role in self.roles),
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


def _decodes(part: Slice) -> bool:
    return part.count == 1 and part.samples


def _smooth(old: float, new: float, weight: float = 0.2) -> float:
    return new if old == 0.0 else (1 - weight) * old + weight * new
