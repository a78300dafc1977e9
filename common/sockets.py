"""Authenticated stream sockets between the processes of a cluster: for bulk bytes and for what must not wait for them.

Blocking, for use on threads of their own. Both ends prove that they know the cluster token before anything else is
read, each by a keyed hash of the other's random challenge; the token itself never travels.

    server ── challenge ──▶ client ── challenge, proof ──▶ server ── proof ──▶ client, then messages either way

A message is a length and its bytes. Whoever waits sets a timeout on the socket first: `settimeout`, or, where many
bytes flow, `limit_waits`.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from .errors import BatonError, HandoverFailed, Unauthorized, WorkerLost

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
CLOSE_S = 1.0
ACCEPT_PAUSE_S = 0.1
MAX_CONNECTIONS = 512
"""Connections that a listener serves at a time; more are closed at once."""

_CHALLENGE = 16
_PROOF = 32
_LENGTH = struct.Struct("<I")

_UNREACHABLE = (OSError, ValueError, TypeError)
"""What Python raises for a host that cannot be reached, or that can be none."""

Buffer = bytes | bytearray | memoryview


def connect(address: str, token: str, timeout_s: float = HANDSHAKE_S) -> socket.socket:
    """A connection to a `Listener` at host:port; `timeout_s` stays set on it. Raises `WorkerLost` where nobody
    answers, `Unauthorized` where the other end does not know the token."""
    host, _, port = address.rpartition(":")
    try:
        connection = unconnected(host)
    except OSError as error:
        raise WorkerLost(f"{address} cannot be reached: {error}") from error
    try:
        connection.settimeout(timeout_s)
        connection.connect((host, int(port)))
    except (*_UNREACHABLE, OverflowError) as error:  # the latter: no such port
        connection.close()
        raise WorkerLost(f"{address} does not answer: {error}") from error
    try:
        _tune(connection)
        theirs, ours = _exactly(connection, _CHALLENGE), secrets.token_bytes(_CHALLENGE)
        send_all(connection, ours + _proof(token, b"client", theirs, ours))
        if not hmac.compare_digest(_exactly(connection, _PROOF), _proof(token, b"server", ours, theirs)):
            raise Unauthorized(f"{address} does not know the cluster token")
    except BatonError:
        connection.close()
        raise
    return connection


class Listener:
    """Accepts connections and runs `serve` for each that knows the token, on a thread of its own. The socket is closed
    when `serve` returns or raises; a `BatonError` is logged. `address` is where it listens, host:port."""

    def __init__(self, host: str, port: int, token: str, serve: Callable[[socket.socket], None], name: str) -> None:
        self._token = token
        self._serve = serve
        self._name = name
        self._open: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._socket = socket.create_server((host, port))
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._door = threading.Thread(target=self._accept, name=f"{name} door", daemon=True)
        self._door.start()

    def close(self) -> None:
        """Stop listening, hang up on everybody, and give the threads that accept and serve a moment to end: one that is
        in a library's code when the interpreter goes takes the process along with it. Idempotent."""
        with self._lock:
            self._closed = True
            for connection in self._open:
                hang_up(connection)
            serving = list(self._open.values())
        hang_up(self._socket)
        self._socket.close()
        deadline = time.monotonic() + CLOSE_S
        for thread in (self._door, *serving):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if self._closed:
                    return
                log.warning("%s: a connection could not be accepted: %s", self._name, error)
                time.sleep(ACCEPT_PAUSE_S)  # out of descriptors, say: trying at once would only burn the processor
                continue
            with self._lock:
                if self._closed or len(self._open) >= MAX_CONNECTIONS:
                    connection.close()
                    continue
                thread = threading.Thread(target=self._run, args=(connection,), name=self._name, daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads are to be had
                    log.warning("%s: nobody to serve a connection: %s", self._name, error)
                    connection.close()
                else:
                    self._open[connection] = thread

    def _run(self, connection: socket.socket) -> None:
        try:
            _tune(connection)
            connection.settimeout(HANDSHAKE_S)
            ours = secrets.token_bytes(_CHALLENGE)
            send_all(connection, ours)
            answer = _exactly(connection, _CHALLENGE + _PROOF)
            theirs, proof = answer[:_CHALLENGE], answer[_CHALLENGE:]
            if not hmac.compare_digest(proof, _proof(self._token, b"client", ours, theirs)):
                raise Unauthorized("the cluster token is missing or wrong")
            send_all(connection, _proof(self._token, b"server", theirs, ours))
            self._serve(connection)
        except BatonError as error:
            level = logging.DEBUG if self._closed or isinstance(error, WorkerLost) else logging.WARNING
            log.log(level, "%s: connection ended: %s", self._name, error)
        finally:
            with self._lock:
                self._open.pop(connection, None)
            connection.close()


def send(connection: socket.socket, *parts: Buffer) -> None:
    """Send one message made of these parts. Raises `WorkerLost` where the other end is gone or does not read."""
    send_all(connection, _LENGTH.pack(sum(memoryview(p).nbytes for p in parts)), *parts)


def receive(connection: socket.socket, limit: int) -> bytes:
    """The next message. Raises `HandoverFailed` where it is longer than `limit`, `WorkerLost` where it does not come
    whole within the socket's timeout, or the other end is gone."""
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if length > limit:
        raise HandoverFailed(f"a message of {length} bytes where at most {limit} are expected")
    return _exactly(connection, length)


def send_all(connection: socket.socket, *parts: Buffer) -> None:
    """Send raw bytes, gathered from all parts. Raises as `send` does."""
    rest = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
    try:
        while rest:
            rest = _after(rest, connection.sendmsg(rest[:_IOV_MAX]))
    except OSError as error:  # a timeout is one
        raise WorkerLost(f"the other end does not read: {error}") from error


def receive_exactly(connection: socket.socket, target: memoryview) -> None:
    """Fill `target` with what comes. Raises `WorkerLost` where it does not come whole within the socket's timeout; with
    `limit_waits`, where nothing is heard for as long, or it is not whole after twice that."""
    rest, timeout, begin = target.cast("B"), connection.gettimeout(), time.monotonic()
    try:
        while rest.nbytes:
            if timeout is not None:
                connection.settimeout(max(begin + timeout - time.monotonic(), _SOON_S))
            count = connection.recv_into(rest, 0, socket.MSG_WAITALL)
            if count == 0:
                raise WorkerLost("the other end hung up")
            rest = rest[count:]
            if rest.nbytes and timeout is None and 0 < _limit(connection) < time.monotonic() - begin:
                raise WorkerLost("too little came")
    except OSError as error:
        raise WorkerLost(f"nothing more came: {error}") from error
    finally:
        if timeout is not None:
            with contextlib.suppress(OSError):  # closed meanwhile
                connection.settimeout(timeout)


def unconnected(host: str) -> socket.socket:
    """A socket to connect to `host` with. Within one host it does without BBR, which is the system's choice in many
    places: a timer that releases packet after packet, though nothing is shared there that could be congested, costs a
    sender a third of its speed. To be chosen before connecting: a socket that has been paced stays so. Where the
    system does not leave the choice, it is the system's. Raises `OSError` where there are no more sockets."""
    connection = socket.socket()
    if hasattr(socket, "TCP_CONGESTION") and _is_here(host):
        with contextlib.suppress(OSError):  # an administrator may allow others only, a sandbox none
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")  # the one that every kernel has
    return connection


def limit_waits(connection: socket.socket, *, sending: float, receiving: float) -> None:
    """Have the system bound each wait on this socket, in seconds (0: not at all), instead of Python: it then waits once
    for all bytes of a call and not for whatever there is, and each wait costs a switch to another thread and back."""
    connection.settimeout(None)
    for option, seconds in ((socket.SO_SNDTIMEO, sending), (socket.SO_RCVTIMEO, receiving)):
        limit = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, option, limit)


def wait(connection: socket.socket) -> None:
    """Return when something has come, or the other end hung up. Without a deadline, for a line whose other end may have
    nothing to say; a host that vanishes is noticed by keepalive."""
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    waiting.poll()


def hang_up(connection: socket.socket) -> None:
    """Wake whoever waits on this socket, on either end. Idempotent."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def hung_up(connection: socket.socket) -> bool:
    """Whether the other end will say no more than what may still wait to be read. Reads nothing, and does not wait."""
    waiting = select.poll()
    waiting.register(connection, select.POLLRDHUP)
    return bool(waiting.poll(0))


_IOV_MAX = 512
_TIMEVAL = struct.Struct("@ll")
_SOON_S = 0.001
"""What is left of a deadline that has passed: a timeout of 0 would mean another thing."""


def _after(parts: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of `parts` once their first `sent` bytes are gone."""
    for i, part in enumerate(parts):
        if sent < part.nbytes:
            return [part[sent:], *parts[i + 1 :]]
        sent -= part.nbytes
    return []


def _limit(connection: socket.socket) -> float:
    """What `limit_waits` has set, in seconds; 0: nothing."""
    limit = connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.size)
    seconds, micros = _TIMEVAL.unpack(limit)
    return float(seconds + micros / 1e6)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    receive_exactly(connection, memoryview(data))
    return bytes(data)


def _proof(token: str, side: bytes, *challenges: bytes) -> bytes:
    return hmac.digest(token.encode(), side + b"".join(challenges), "sha256")


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):  # a host that vanished
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _is_here(host: str) -> bool:
    """Whether the way there begins where it ends. Asks the routing table; nothing is sent. False where there is no way:
    who connects is told why."""
    try:
        with socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # any port
            return bool(probe.getsockname()[0] == probe.getpeername()[0])
    except _UNREACHABLE:
        return False
