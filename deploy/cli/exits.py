"""How a command ends: its exit code, and the errors that have one of their own."""

from __future__ import annotations

import enum

from ...common.errors import BatonError, InvalidRequest


class Exit(enum.IntEnum):
    """What the shell sees. Scripts may rely on it."""

    DONE = 0
    FAILED = 1
    ARGUMENTS = 2
    """The arguments, or the configuration, are wrong; nothing was done."""
    NO_CLUSTER = 3
    """No cluster was found, or it did not answer."""
    REFUSED = 4
    """The cluster answered no."""
    NOT_REACHED = 5
    """What was asked for is under way, but was not reached within --timeout."""
    INTERRUPTED = 130
    """By Ctrl-C, or by a question that was answered with no."""


EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 wrong arguments, 3 no cluster reachable, 4 refused by the cluster, "
    "5 not reached within --timeout, 130 interrupted."
)


class NoCluster(BatonError):
    """There is no cluster to talk to, or it does not answer."""

    code, http_status = "no_cluster", 503


class Refused(BatonError):
    """The cluster refused an operation; the message is its own."""

    code, http_status = "refused", 409


class NotReached(BatonError):
    """The cluster is not yet where it shall be, and the time given is over."""

    code, http_status = "not_reached", 504


def exit_code(error: BatonError) -> Exit:
    """The code that a command ends with which raised `error`."""
    codes = {InvalidRequest: Exit.ARGUMENTS, NoCluster: Exit.NO_CLUSTER, Refused: Exit.REFUSED}
    codes[NotReached] = Exit.NOT_REACHED
    return next((code for kind, code in codes.items() if isinstance(error, kind)), Exit.FAILED)
