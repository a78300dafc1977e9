"""Typed errors. Each has a stable `code` that travels on the wire, an HTTP status for the gateway, and says whether
another try elsewhere can help. Nothing else is raised across a room's border on purpose."""

from __future__ import annotations


class BatonError(Exception):
    """Base of all errors that a caller may meet. `retryable`: the router may try another worker."""

    code = "internal_error"
    http_status = 500
    retryable = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(BatonError):
    """The caller's values are wrong; `param` names the first that is."""

    code, http_status = "invalid_value", 400


class PromptTooLong(BatonError):
    """Prompt (plus the output asked for) exceeds what the model or the KV pools hold."""

    code, http_status = "context_length_exceeded", 400


class UnknownModel(BatonError):
    code, http_status = "model_not_found", 404


class Unauthorized(BatonError):
    code, http_status = "invalid_api_key", 401


class Conflict(BatonError):
    """What is asked for does not go together with what is under way."""

    code, http_status = "conflict", 409


class Overloaded(BatonError):
    """A bounded queue is full. `retry_after_s` says when to come back."""

    code, http_status = "overloaded", 429


class NotReady(BatonError):
    """No worker can take the request now (loading, draining, or all gone)."""

    code, http_status = "not_ready", 503


class DeadlineExceeded(BatonError):
    code, http_status = "deadline_exceeded", 504


class WorkerLost(BatonError):
    """The worker died, froze, or its connection broke."""

    code, http_status, retryable = "worker_lost", 503, True


class PoisonRequest(BatonError):
    """Several workers were lost while they held this request; it is not tried again."""

    code, http_status = "request_killed_workers", 500


class PoolFull(BatonError):
    """The worker has no room (KV blocks, handover slots or queue) for this request now."""

    code, http_status, retryable = "pool_full", 503, True


class StaleEpoch(BatonError):
    """A message meant for, or sent by, another incarnation of a process."""

    code, http_status, retryable = "stale_epoch", 503, True


class StaleAttempt(BatonError):
    code, http_status, retryable = "stale_attempt", 503, True


class WrongRole(BatonError):
    """A worker was asked for what its role does not do: it has been turned, and the caller has not heard of it yet."""

    code, http_status, retryable = "wrong_role", 503, True


class FingerprintMismatch(BatonError):
    """Two workers with different weights, KV layout or numeric choices were asked to hand over."""

    code, http_status, retryable = "fingerprint_mismatch", 503, True


class HandoverFailed(BatonError):
    """The KV handover was aborted: lease expired, checksum wrong, peer gone, protocol broken."""

    code, http_status, retryable = "handover_failed", 503, True


class TransportFailed(HandoverFailed):
    """A transport can not be had between two ranks, or broke; another may do."""

    code = "transport_failed"


class CorruptBlock(HandoverFailed):
    """KV does not hash to what its source says. Where it went wrong is not known: the source computes it again."""

    code = "corrupt_block"


class EngineFailure(BatonError):
    """The engine raised inside a step."""

    code, http_status, retryable = "engine_failure", 500, True


class EngineBroken(EngineFailure):
    """The engine can compute no more, as when one of its ranks is lost: its process must end and be started again."""

    code, http_status, retryable = "engine_broken", 500, True


def _tree(cls: type[BatonError]) -> dict[str, type[BatonError]]:
    found = {cls.code: cls}
    for child in cls.__subclasses__():
        found.update(_tree(child))
    return found


_BY_CODE = _tree(BatonError)


def from_code(code: str, message: str, retry_after_s: float | None = None) -> BatonError:
    """Rebuild the typed error that a peer sent; an unknown code becomes a plain `BatonError`."""
    return _BY_CODE.get(code, BatonError)(message, retry_after_s=retry_after_s)
