"""What a failed attempt means for its request: who is to blame, how long to keep away from him, and when to give up."""

from __future__ import annotations

from collections.abc import Iterable

from ..common.config import RouterConfig
from ..common.errors import (
    BatonError,
    EngineFailure,
    HandoverFailed,
    PoisonRequest,
    PoolFull,
    WorkerLost,
    WrongRole,
    from_code,
)
from .fleet import Attempt, Worker
from .request import RequestState

RETRY_AFTER_S = 1.0
"""What a client that is turned away is told to wait."""
EXCLUSION_S = 1.0
"""For how long a worker that failed a request is not asked again for it."""
FIRST_BACKOFF_S = 0.05
"""For how long a worker that refuses a request is not asked again for it; doubles with each refusal."""
MAX_BACKOFF_S = 1.0
EXONERATED_AFTER = 16
"""Output tokens of one attempt after which earlier losses are not held against a request any more."""


def blamed(attempt: Attempt, reporter: str, error: BatonError) -> str:
    """Which worker to keep away from. Who reports is alive: unless its own engine failed, a pair's trouble lies with
    the other one."""
    if reporter == attempt.prefill and attempt.decode is not None and not isinstance(error, EngineFailure | WrongRole):
        return attempt.decode
    return reporter


def parting(worker: Worker, why: BatonError) -> BatonError:
    """What the end of a worker's session is to the requests that it has: no fault of theirs where it was to leave, or
    plays another role from now on."""
    orderly = worker.leaving or isinstance(why, WrongRole)
    return (HandoverFailed if orderly else WorkerLost)(f"worker {worker.name}: {why}")


def note(state: RequestState, error: BatonError, worker: str, now: float) -> None:
    """Enter a failure in the request's own books: its count, and the worker to keep away from for a while."""
    pause = EXCLUSION_S
    if isinstance(error, PoolFull):
        pause = min(FIRST_BACKOFF_S * 2.0**state.refusals, MAX_BACKOFF_S)
        state.refusals += 1
    state.losses += isinstance(error, WorkerLost | EngineFailure)
    state.excluded[worker] = now + pause
    state.story.fails(worker, error.code, now)


def suspect(state: RequestState, config: RouterConfig) -> bool:
    """One loss more and the request is given up. It may be the killer, or a neighbour of his each time; so suspects
    are kept apart from one another (at most one on a worker) until it shows."""
    return 0 < config.max_losses - 1 <= state.losses


def suspected(states: Iterable[RequestState], config: RouterConfig) -> set[str]:
    """Workers that hold a suspect."""
    attempts = [s.attempt for s in states if s.attempt and suspect(s, config)]
    return {name for a in attempts for name in ((a.prefill, a.decoder) if a.source else (a.decoder,))}


def exonerate(state: RequestState, attempt: Attempt) -> None:
    """A suspect that has got on for a while by itself was the neighbour."""
    if state.losses and len(state.output) - attempt.begins >= EXONERATED_AFTER:
        state.losses = 0


def verdict(state: RequestState, error: BatonError, config: RouterConfig) -> BatonError | None:
    """With what the request ends after its last `error`; None if it is tried again."""
    if state.losses >= config.max_losses:
        return PoisonRequest(f"given up after {state.losses} lost workers; the last: {error}")
    if state.attempts - state.refusals < config.max_attempts:  # for refusals the time to be placed is the bound
        return None
    return from_code(error.code, f"given up after {state.attempts} attempts; the last: {error}", RETRY_AFTER_S)
