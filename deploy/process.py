"""Entry of every process that a launcher starts: `python -m baton.deploy.process`, configuration on standard input.

Nothing of a role is imported before the configuration says which: a gateway never loads torch, a worker never loads
fastapi.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from ..common import events, log
from ..common.child import EXIT_CONFIG, EXIT_FAILED, die_with, read_line, show_as
from ..common.config import ControllerConfig, GatewayConfig, WorkerConfig
from ..common.errors import BatonError
from ..common.json_form import from_json, from_plain
from .launch.launcher import Envelope
from .models import ImportJob

logger = logging.getLogger("baton")


def main() -> int:
    """Read the configuration, become that process, and return its exit code."""
    envelope = from_json(read_line(), Envelope)
    show_as(envelope.name)
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

            uvloop.run(run_gateway(from_plain(envelope.config, GatewayConfig)))
        case "worker":
            from ..worker.main import run as run_worker

            events.run(run_worker(from_plain(envelope.config, WorkerConfig)))
        case "controller":
            from .control.main import run as run_controller

            asyncio.run(run_controller(from_plain(envelope.config, ControllerConfig)))
        case "import":
            from ..engine.gguf import import_gguf

            job = from_plain(envelope.config, ImportJob)
            import_gguf(Path(job.source), Path(job.target), job.dtype)
        case kind:
            raise BatonError(f"no such kind of process: {kind}")


if __name__ == "__main__":
    sys.exit(main())
