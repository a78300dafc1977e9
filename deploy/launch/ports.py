"""Ports that are settled before anything starts, and kept for the processes that will listen there."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from ...common.errors import BatonError


@dataclass(frozen=True, slots=True)
class Port:
    """A port of this machine, held by a bound socket that never listens.

    While it is held the system gives the port to nobody else: neither to another server, nor, while the one that is to
    listen there is being started again, to one of the many connections that try to reach it, which would then reach
    themselves.
    """

    host: str
    port: int
    hold: socket.socket

    @property
    def url(self) -> str:
        """As seen from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only processes of this machine reach it."""
        return self.host in ("127.0.0.1", "localhost", "::1")


def claim_port(host: str, port: int) -> Port:
    """Find out whether a process will be able to listen there, and hold it for it; 0 picks a free port. Whoever listens
    there sets SO_REUSEADDR, as the holder does. Raises `BatonError` if not."""
    hold = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    hold.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        hold.bind((host, port))
    except OSError as error:
        hold.close()
        raise BatonError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return Port(host, hold.getsockname()[1], hold)
