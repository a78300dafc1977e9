"""What a child process does first: read its configuration from standard input, and tie its life to its parent's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading

EXIT_FAILED = 1
EXIT_CONFIG = 78
"""A process was told what can never work (EX_CONFIG of sysexits.h): starting it again is of no use."""

_PR_SET_PDEATHSIG = 1


def read_line() -> bytes:
    """The configuration: one line. Exits where there is none, as when a person starts the module by hand."""
    # Not through sys.stdin, whose buffer the lifeline, which reads the same descriptor afterwards, could hold at exit.
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(0, 1 << 16)
        if not data:
            sys.exit("this is started by `baton serve`, with its configuration on standard input")
        line += data
    return line


def show_as(name: str) -> None:
    """What `ps` shows of this process. Where the package for it is missing, that is the command line, as ever."""
    with contextlib.suppress(ModuleNotFoundError):
        import setproctitle

        setproctitle.setproctitle(f"baton {name}")


def die_with(parent: int) -> None:
    """End this process when `parent` ends, however that happens.

    Linux delivers SIGKILL at once, to a stopped process as well. Everywhere, standard input ends, which a thread waits
    for; it needs the interpreter to run, so it comes second.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(EXIT_FAILED)
    threading.Thread(target=_lifeline, name="lifeline", daemon=True).start()


def _lifeline() -> None:
    while os.read(0, 1 << 10):
        pass
    os._exit(EXIT_FAILED)
