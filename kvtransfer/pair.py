"""A group of two ranks of `torch.distributed`: a source's and a target's, with no world around it.

The two find each other over their lane's authenticated socket: torch's own store would tell anybody where they listen.
Whoever reaches a rank's port first is taken for its peer by gloo and NCCL, so each proves by the group that it is who
is at the socket's other end. A pair fails as a whole and for good: whoever waits too long, or is told that the other
end hung up, makes another.

A source that sends more by gloo than its header said ends the target's process, inside gloo. Such a worker is started
again, and its streams go on elsewhere; and only those who ask for process groups between CPUs let gloo in at all.

gloo between CPUs, NCCL between GPUs. NCCL has not been seen at work here: it refuses two ranks on one GPU, and no
machine with two was to be had.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgpack
import torch
import torch.distributed

from ..common import sockets
from ..common.errors import HandoverFailed, TransportFailed, WorkerLost

_c10d: Any = torch.distributed
"""Any: torch's type stubs do not know what its single backends can do."""

Done = Callable[[], None]
"""Waits until bytes have left, or arrived. Raises `WorkerLost` where the other end is gone or takes too long."""

_BYTES, _NEVER_SENT = 0, 1  # tags

_PROOF = 32  # bytes

_GLOO_PATIENCE = timedelta(minutes=1)
"""Five times as long gloo waits for the other end to connect."""

_MOST_CONNECTING = 256
"""Pairs that connect by gloo at a time, those that were given up included: each has threads and a port of its own, and
a source that never comes costs its target no more than these."""

_connecting = threading.BoundedSemaphore(_MOST_CONNECTING)

_LOOK_EVERY_S = 5e-5
_MAX_MESSAGE = 4 << 10
_MAX_KEYS = 64


class Pair:
    """One end. Made at both ends at a time, in threads that own the socket until then; takes `patience` seconds at
    most, and so does each wait thereafter. `host`: the address that gloo listens at. Raises `WorkerLost` where the two
    do not come together in time, for the other may just be frozen; `TransportFailed` where somebody else came."""

    def __init__(
        self, connection: socket.socket, source: bool, device: torch.device, host: str, patience: float
    ) -> None:
        self._peer = 1 if source else 0
        self._aborted = False
        self._patience = timedelta(seconds=patience)
        self._nccl = device.type == "cuda"
        before = connection.gettimeout()
        try:
            connection.settimeout(patience)
            meeting, rank = _Meeting(connection), 1 - self._peer
            self._group = _nccl(meeting, rank, patience) if self._nccl else _gloo(meeting, rank, patience, host)
            self._prove(meeting, device)  # NCCL connects when it is first used, which is here
        except (RuntimeError, OSError) as error:  # OSError: the socket has just been closed
            raise WorkerLost(f"no pair came about: {_first_line(error)}") from error
        finally:
            with contextlib.suppress(OSError):  # closed meanwhile
                connection.settimeout(before)

    def _prove(self, meeting: _Meeting, device: torch.device) -> None:
        """Each says by the socket what it wants to hear by the group. The source speaks first there."""
        rank, wanted = 1 - self._peer, secrets.token_bytes(_PROOF)
        meeting.set(f"said by {self._peer}", wanted)
        ours = meeting.get(f"said by {rank}")
        if len(ours) != _PROOF:
            raise HandoverFailed("not what two ranks tell each other")
        speech = torch.tensor(list(ours), dtype=torch.uint8, device=device)
        heard = torch.zeros_like(speech)
        if rank == 0:
            self.send(speech)()
        self.receive(heard)()
        if not hmac.compare_digest(bytes(heard.tolist()), wanted):
            self.abort()
            raise TransportFailed("somebody else came to the pair")
        if rank == 1:
            self.send(speech)()

    def send(self, data: torch.Tensor) -> Done:
        """Begin to send; `data` must stay as it is until that is done."""
        return self._begin(self._group.send, data)

    def receive(self, data: torch.Tensor) -> Done:
        """Begin to receive what the other end sends next, of this size. Receipts follow the order of sends."""
        return self._begin(self._group.recv, data)

    def _begin(self, operation: Any, data: torch.Tensor) -> Done:
        try:
            work = operation([data], self._peer, _BYTES)
        except RuntimeError as error:
            raise WorkerLost(f"the pair is broken: {_first_line(error)}") from error
        return lambda: self._finish(work)

    def _finish(self, work: Any) -> None:
        late = time.monotonic() + self._patience.total_seconds()
        # Where NCCL works, torch would look once a millisecond whether it is done.
        while self._nccl and not (self._aborted or work.is_completed() or time.monotonic() > late):
            time.sleep(_LOOK_EVERY_S)
        try:
            work.wait(self._patience)
        except RuntimeError as error:
            raise WorkerLost(f"the pair broke: {_first_line(error)}") from error
        if self._aborted:  # NCCL lets go of those who wait, and says nothing
            raise WorkerLost("the pair was given up")

    def abort(self) -> None:
        """Wake whoever waits here: what was under way fails. From any thread. Idempotent."""
        self._aborted = True
        if self._nccl:
            self._group.abort()
            return
        # gloo's own abort wakes nobody. But one operation that waits in vain breaks the pair for all that wait.
        with contextlib.suppress(RuntimeError):
            vain = self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, _NEVER_SENT)
            vain.wait(timedelta(milliseconds=1))


def _gloo(meeting: _Meeting, rank: int, patience: float, host: str) -> Any:
    """Connects on a thread of its own, which is left behind when `patience` ends. Were gloo's own patience to end, it
    would free what its listener still calls when the other end, frozen or just slow, connects after all; and that is
    the end of the process."""
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()
    if not _connecting.acquire(blocking=False):
        raise WorkerLost("too many pairs are waiting for their other ends")
    try:
        threading.Thread(target=_connect, args=(meeting, rank, host, outcome), name="gloo", daemon=True).start()
    except RuntimeError:  # no more threads are to be had
        _connecting.release()
        raise
    try:
        made = outcome.get(timeout=patience)
    except queue.Empty:
        raise WorkerLost("no pair came about: the other end takes too long") from None
    if isinstance(made, Exception):
        raise made
    return made


def _connect(meeting: _Meeting, rank: int, host: str, outcome: queue.SimpleQueue[Any]) -> None:
    options = _c10d.ProcessGroupGloo._Options()
    options._timeout = _GLOO_PATIENCE
    options._threads = 1  # for what takes more than two; not for sends
    try:
        options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=host)]
        outcome.put(_c10d.ProcessGroupGloo(meeting, rank, 2, options))
    except Exception as error:  # the edge of a thread: raised again where the outcome is waited for
        outcome.put(error.with_traceback(None))  # with it, the error would hold the listener
    finally:
        _connecting.release()


def _nccl(meeting: _Meeting, rank: int, patience: float) -> Any:
    # A wait that takes too long raises then, and there is no watchdog that would end the process.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    options = _c10d.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=patience)
    return _c10d.ProcessGroupNCCL(meeting, rank, 2, options)


class _Meeting(_c10d.Store):  # type: ignore[misc]
    """What two ranks tell each other to find each other: a store of two, over a socket with a timeout."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self._said: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._said[key] = value
        sockets.send(self._connection, msgpack.packb((key, value)))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._said[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._said for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        while not self.check(keys):
            try:
                key, value = msgpack.unpackb(sockets.receive(self._connection, _MAX_MESSAGE))
            except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
                raise HandoverFailed(f"not what two ranks tell each other: {error}") from error
            if type(key) is not str or type(value) is not bytes or len(self._said) >= _MAX_KEYS:
                raise HandoverFailed("not what two ranks tell each other")
            self._said[key] = value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
