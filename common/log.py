"""One line a fact, on standard error: time, process, level, request id when there is one, message."""

from __future__ import annotations

import logging
import sys


class _Line(logging.Formatter):
    """`extra={"request_id": ...}` of a record shows as `[id]`."""

    def __init__(self, name: str) -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self._name = name

    def formatMessage(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", None)
        mark = f" [{request_id}]" if request_id else ""
        when = f"{self.formatTime(record, self.datefmt)}.{int(record.msecs):03d}"
        return f"{when} {self._name} {record.levelname.lower()}{mark} {record.message}"


def setup(name: str, level: int = logging.INFO) -> None:
    """Make every logger of this process write to standard error under the process's `name` ("gateway", "decode-1").
    Called once, at a process's start; a second call replaces the first."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line(name))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "uvicorn.access", "uvicorn.error", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
