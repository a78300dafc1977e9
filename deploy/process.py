"""Entry of every process that a launcher starts: `python -m baton.deploy.process`, configuration on standard input.

Nothing of a role is imported before the configuration says which: a gateway never loads torch, a worker never loads
fastapi.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import setproctitle

from ..common import log
from ..common.config import GatewayConfig, WorkerConfig, from_json
from ..common.errors import BatonError
from .launcher import EXIT_CONFIG, EXIT_FAILED, Envelope
from .models import ImportJob

PR_SET_PDEATHSIG = 1

logger = logging.getLogger("baton")


def main() -> int:
    """Read the configuration, become that process, and return its exit code."""
    envelope = from_json(_read_line(), Envelope)
    setproctitle.setproctitle(f"baton {envelope.name}")
    log.setup(envelope.name)
    die_with(envelope.parent)
    try:
        _run(envelope)
    except BatonError as error:
        logger.error("%s", error.message)
        return EXIT_CONFIG if error.http_status < 500 else EXIT_FAILED
    except Exception:  # the edge of the process: whatever ended it belongs into its log
        logger.exception("ended by an unexpected error")
        return EXIT_FAILED
    return 0


def _run(envelope: Envelope) -> None:
    match envelope.kind:
        case "gateway":
            import uvloop

            from ..gateway.main import run as run_gateway

            uvloop.run(run_gateway(from_json(bytes(envelope.config), GatewayConfig)))
        case "worker":
            from ..worker.main import run as run_worker

            asyncio.run(run_worker(from_json(bytes(envelope.config), WorkerConfig)))
        case "import":
            from ..engine.gguf import import_gguf

            job = from_json(bytes(envelope.config), ImportJob)
            import_gguf(Path(job.source), Path(job.target), job.dtype)
        case kind:
            raise BatonError(f"no such kind of process: {kind}")


def _read_line() -> bytes:
    # Not through sys.stdin, whose buffer the lifeline, which reads the same descriptor afterwards, could hold at exit.
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(0, 1 << 16)
        if not data:
            sys.exit("baton.deploy.process is started by `baton serve`, with its configuration on standard input")
        line += data
    return line


def die_with(parent: int) -> None:
    """End this process when `parent` ends, however that happens.

    Linux delivers SIGKILL at once, to a stopped process as well. Everywhere, standard input ends, which a thread waits
    for; it needs the interpreter to run, so it comes second.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(EXIT_FAILED)
    threading.Thread(target=_lifeline, name="lifeline", daemon=True).start()


def _lifeline() -> None:
    while os.read(0, 1 << 10):
        pass
    os._exit(EXIT_FAILED)


if __name__ == "__main__":
    sys.exit(main())
