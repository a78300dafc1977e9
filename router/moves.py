"""What moves between workers beside new requests: running requests off a worker that is to be emptied, and answers'
KV back to where the next turn's prompt will look for it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..common.messages import Move, Share, TokenOut
from .choose import Demand, choose_decode
from .fleet import Attempt, Fleet, Worker
from .request import MAX_BACKLOG, RequestState

MOVES_AT_ONCE = 4
"""Requests that leave one worker at a time: each pauses for its last block, and the wire is shared."""
TRY_AGAIN_S = 0.5
"""How long a request that could not be moved is left alone."""
SHARE_S = 30.0
"""How long a cache may take to get what it is given."""


def due(fleet: Fleet, tickets: Mapping[int, RequestState], now: float) -> Iterator[tuple[str, Move]]:
    """(worker, move) for what can move off workers that are leaving. Enters it as being on its way."""
    for worker in [w for w in fleet.workers.values() if w.leaving and not w.stalled]:
        attempts = [a for t in sorted(worker.tickets) if (a := tickets[t].attempt) and a.decoder == worker.name]
        free = MOVES_AT_ONCE - sum(a.moving is not None for a in attempts)
        for attempt in [a for a in attempts if _movable(a, now)][: max(0, free)]:
            state = tickets[attempt.ticket]
            left = state.request.params.max_tokens - len(state.output)
            reach = min(state.ceiling, state.position + left)  # where it would end here: nowhere else sooner
            alike = [w for w in fleet.usable() if w.info.fingerprint == worker.info.fingerprint and w.longest >= reach]
            target = choose_decode(alike, Demand(state.position, left), attempt.ticket)
            if target is None:
                continue
            attempt.moving = target
            yield worker.name, Move(attempt.ticket, target.info.ref)


def queued(fleet: Fleet, tickets: Mapping[int, RequestState]) -> list[RequestState]:
    """Requests that wait on workers that are leaving, or for them, and that nobody has begun to compute: another pair
    does as well, and the worker is empty sooner."""
    held = sorted({ticket for w in fleet.workers.values() if w.leaving for ticket in w.tickets})
    return [tickets[t] for t in held if (a := tickets[t].attempt) and not (a.begun or a.computing)]


def _movable(attempt: Attempt, now: float) -> bool:
    """It decodes, and nowhere else has it."""
    decodes = attempt.begun and (attempt.decode is None or not attempt.source)
    return decodes and attempt.moving is None and now >= attempt.not_before


def arrived(fleet: Fleet, attempt: Attempt) -> Worker | None:
    """A request has been taken by the worker that it was moved to. None if our session with it has ended since: then it
    has not kept it, even if it is back."""
    target = attempt.moving
    if target is None or fleet.workers.get(target.name) is not target:
        return None
    fleet.moved(attempt, target)
    return target


def share_back(fleet: Fleet, state: RequestState, ticket: int) -> tuple[str, Share] | None:
    """(worker, message) that brings the KV of an answer to the prefill worker that computed its prompt; None where
    there is no such worker (any more), or the answer fills no block."""
    attempt = state.attempt
    if attempt is None or attempt.decode is None:
        return None
    source, target = fleet.workers.get(attempt.decoder), fleet.workers.get(attempt.prefill)
    if source is None or target is None or not target.usable:
        return None
    if len(state.output) < target.info.block_size:
        return None
    return source.name, Share(ticket, replace(state.so_far(0.0), deadline_s=SHARE_S), target.info.ref)


def ahead(attempt: Attempt, name: str, token: TokenOut) -> bool:
    """Keep a token that comes from the worker that the request moves to, ahead of what comes before it. False: from
    there nothing is awaited."""
    if attempt.moving is None or name != attempt.moving.name or len(attempt.early) >= MAX_BACKLOG:
        return False
    attempt.early.append(token)
    return True
