"""The ordered stream of commands from rank 0 of a worker to its other ranks, and their reports back.

Rank 0 has the only block table and the only inbox: it decides, and tells everybody what it decided in one order. A
follower applies one command after the other, so what one command does to its pool the next one finds.

    rank 0 ── [command, arguments …] ──▶ each follower            msgpack over `common/sockets.py`
    rank 0 ◀── [report, arguments …] ── any of them, at any time
"""

from __future__ import annotations

import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgpack

from ..common import sockets
from ..common.errors import EngineBroken, WorkerLost

GROUP_TIMEOUT_S = 10.0
"""How long the ranks may be apart at a collective operation, or a command may lie unread."""
MAX_MESSAGE = 64 << 20
STALL_S = 120.0
"""A rank that is starting and has said nothing for this long is taken for hung."""

HERE, PROGRESS, READY = "here", "progress", "ready"
"""What a follower reports while it starts: that it runs, the share that it has loaded, and that it has loaded all. With
the last comes what its rank 0 is to know of it."""

MEET = "meet"
"""The command to make the `RankGroup`, in which none waits long for another: it comes when all run."""

Handler = Callable[..., None]


class Followers:
    """Rank 0's end. Any thread may call any method; all followers get all commands in the same order.

    address, token   where followers connect, and the secret that they show
    meeting          the file in which the ranks' `RankGroup` finds itself
    lost             ends with `EngineBroken` when a follower is lost: the worker can compute no more
    """

    def __init__(self, count: int, timeout_s: float = GROUP_TIMEOUT_S) -> None:
        """`timeout_s`: how long a follower may leave a command unread, or keep others waiting in a `RankGroup`."""
        self.timeout_s = timeout_s
        self.token = secrets.token_hex()
        self.lost: Future[None] = Future()
        self._count = count
        self._folder = Path(tempfile.mkdtemp(prefix="baton-ranks-"))  # only this user may enter it
        self.meeting = str(self._folder / "meeting")
        self._handlers: dict[str, Handler] = {}
        self._lines: dict[int, socket.socket] = {}
        self._said: dict[tuple[int, str], list[Any]] = {}
        self._words = 0
        self._changed = threading.Condition()
        self._order = threading.Lock()
        self._listener = sockets.Listener("127.0.0.1", 0, self.token, self._serve, "followers")
        self.address = self._listener.address

    def subscribe(self, report: str, handler: Handler) -> None:
        """Call `handler(rank, *arguments)` for each such report, on the thread that reads that rank's reports."""
        self._handlers[report] = handler

    def wait_for(self, report: str) -> list[list[Any]]:
        """Return when every follower has made this report: its last arguments, in order of rank. Raises `EngineBroken`
        when one is lost, or none has said anything for `STALL_S`."""
        with self._changed:
            while not self.lost.done() and sum(name == report for _, name in self._said) < self._count:
                words = self._words
                self._changed.wait(STALL_S)
                if self._words == words:
                    self.lose(f"ranks are not {report}, and have said nothing for {STALL_S:.0f} s")
            self.check()
            return [self._said[rank, report] for rank in range(1, self._count + 1)]

    def send(self, command: str, *arguments: Any) -> None:
        """Give every follower a command. Raises `EngineBroken` where one is lost, or does not read for the timeout."""
        self.check()
        message = msgpack.packb([command, *arguments])
        with self._order:
            for rank, line in self._lines.items():
                try:
                    sockets.send(line, message)
                except WorkerLost as error:
                    self.lose(f"rank {rank} takes no commands: {error.message}")
        self.check()

    def lose(self, why: str) -> None:
        """Note that a follower is lost. Only the first time counts."""
        with self._changed:
            if not self.lost.done():
                self.lost.set_exception(EngineBroken(why))
            self._changed.notify_all()

    def check(self) -> None:
        """Raises `EngineBroken` where a follower is lost."""
        if self.lost.done():
            self.lost.result()

    def close(self) -> None:
        """Hang up on all followers, which ends them. Idempotent."""
        self.lose("the worker ends")
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _serve(self, line: socket.socket) -> None:
        """Take in one follower's reports until its line ends, for whatever reason."""
        (rank,) = msgpack.unpackb(sockets.receive(line, MAX_MESSAGE))
        line.settimeout(self.timeout_s)
        with self._order:
            self._lines[rank] = line
        self._note(rank, HERE, [])
        try:
            while True:
                report, *arguments = _next(line)
                if handler := self._handlers.get(report):
                    handler(rank, *arguments)
                self._note(rank, report, arguments)
        finally:
            self.lose(f"rank {rank} hung up")

    def _note(self, rank: int, report: str, arguments: list[Any]) -> None:
        with self._changed:
            self._said[rank, report] = arguments
            self._words += 1
            self._changed.notify_all()


class Follower:
    """A follower's end. Raises `WorkerLost` where rank 0 is gone, from any method."""

    def __init__(self, address: str, token: str, rank: int, timeout_s: float = GROUP_TIMEOUT_S) -> None:
        self._order = threading.Lock()
        self._line = sockets.connect(address, token)
        self._line.settimeout(timeout_s)
        sockets.send(self._line, msgpack.packb([rank]))

    def report(self, name: str, *arguments: Any) -> None:
        """Tell rank 0 something, from any thread."""
        with self._order:
            sockets.send(self._line, msgpack.packb([name, *arguments]))

    def expect(self, command: str) -> None:
        """Wait for one command. Raises `EngineBroken` where another one comes."""
        found, *_ = _next(self._line)
        if found != command:
            raise EngineBroken(f"command {found!r} where {command!r} is expected")

    def follow(self, handlers: Mapping[str, Handler]) -> None:
        """Apply the commands that come, in order, until rank 0 hangs up, which raises `WorkerLost`. Raises
        `EngineBroken` at a command that has no handler."""
        while True:
            command, *arguments = _next(self._line)
            if command not in handlers:
                raise EngineBroken(f"unknown command {command!r}")
            handlers[command](*arguments)

    def close(self) -> None:
        self._line.close()


def _next(line: socket.socket) -> list[Any]:
    """The next message. It may be long in coming, but once it has begun it must come within the socket's timeout."""
    sockets.wait(line)  # whoever has nothing to say is silent, and whoever ends hangs up
    message: list[Any] = msgpack.unpackb(sockets.receive(line, MAX_MESSAGE))
    return message
