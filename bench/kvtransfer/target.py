"""The target as a process of its own, told by the source what to do next: `python -m baton.bench.kvtransfer.target FD`.

A command is a JSON list on a socket, [name, argument ...]; its answer is one JSON value. `Target`'s public methods are
the commands.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

from ...common import sockets
from ...common.child import die_with
from ...common.errors import WorkerLost
from ...common.json_form import from_json, from_plain, to_json
from ...common.kv_format import KvFormat
from ...common.messages import Endpoint
from ...kvtransfer.shm import PeerMemory
from . import raw
from .end import TIMEOUT_S, End, Events, layer_hash, make_pool, on_core, scattered

_MESSAGE = 1 << 20
KEY_NAME = "source"


class Target:
    """Takes handovers in at `ends[checked]`, and is the receiving half of each raw measurement."""

    def __init__(self, events: Events, format: KvFormat, num_blocks: int) -> None:
        self._format = format
        self._pool = make_pool(format, num_blocks, seed=2)
        self._blocks = scattered(num_blocks, seed=2)
        self.ends = {checked: End("target", format, self._pool, checked, events) for checked in (True, False)}
        self._receiver = raw.Receiver()
        self._group: raw.Group | None = None

    def endpoint(self, checked: bool) -> Endpoint:
        return self.ends[checked].endpoint

    # --- handovers ---

    def open(self, checked: bool, handover_id: int, count: int) -> None:
        """Reserve for `count` blocks that all come."""
        key = (KEY_NAME, 1, handover_id)
        self.ends[checked].plane.inlet.open(key, 1, self._format, 0, self._blocks[:count])
        self.ends[checked].plane.inlet.expect(key, count)

    def filled(self, checked: bool, handover_id: int) -> float:
        """When it was complete, on the clock that all processes of this machine share."""
        self.ends[checked].wait_filled()
        done = time.monotonic()
        self.ends[checked].plane.inlet.close((KEY_NAME, 1, handover_id))
        return done

    def content(self, layer: int, count: int) -> str:
        """A hash of what the first `count` blocks of the sequence hold in one layer, which is then wiped."""
        content = layer_hash(self._pool, self._format, self._blocks[:count], layer)
        self._pool.memory.reshape(self._format.num_layers, -1)[layer] = 0
        return content

    # --- raw limits ---

    def memcpy(self, door: str, size: int) -> float:
        """Seconds to copy the front of the source's pool, mapped as transports map it, to the front of ours."""
        return raw.memcpy(PeerMemory(door, self._format).memory[:size], self._pool.memory[:size])

    def socket(self) -> int:
        return self._receiver.port

    def accept(self) -> None:
        self._receiver.accept()

    def receive(self, number: int, size: int, warm: bool) -> float:
        return self._receiver.receive(number, raw.small(raw.CHUNK) if warm else self._pool.memory, size)

    def group(self, port: int) -> None:
        self._group = raw.Group(1, port)
        self._group.join()

    def group_receive(self, size: int, message: int, warm: bool, under_way: int) -> float:
        assert self._group is not None
        return self._group.move(raw.small(message) if warm else self._pool.memory, size, message, under_way)

    def close(self) -> None:
        self._group = None
        for end in self.ends.values():
            end.stop()


class Remote:
    """The target process, seen from the source. Raises `WorkerLost` where it has ended or does not answer."""

    def __init__(self, format: KvFormat, num_blocks: int) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(TIMEOUT_S)
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.PIPE, pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        self.tell(format, num_blocks)
        self.answer()

    def tell(self, *command: object) -> None:
        sockets.send(self._socket, to_json(command))

    def answer(self) -> Any:
        return json.loads(sockets.receive(self._socket, _MESSAGE))

    def ask(self, *command: object) -> Any:
        self.tell(*command)
        return self.answer()

    def endpoint(self, checked: bool) -> Endpoint:
        return from_plain(self.ask("endpoint", checked), Endpoint)

    def close(self) -> None:
        self._socket.close()
        try:
            self._child.wait(TIMEOUT_S)
        finally:
            self._child.kill()
            assert self._child.stdin is not None
            self._child.stdin.close()


def main(descriptor: int, parent: int) -> None:
    die_with(parent)
    connection = socket.socket(fileno=descriptor)
    format, num_blocks = from_json(sockets.receive(connection, _MESSAGE), tuple[KvFormat, int])
    with on_core(1):
        target = Target(Events(), format, num_blocks)
        sockets.send(connection, b"null")
        try:
            while True:
                name, *arguments = json.loads(sockets.receive(connection, _MESSAGE))
                sockets.send(connection, to_json(getattr(target, name)(*arguments)))
        except WorkerLost:  # the source is through
            target.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
