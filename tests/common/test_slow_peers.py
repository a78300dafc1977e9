"""Sockets whose other end says things very slowly, or is gone."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from baton.common import sockets
from baton.common.errors import WorkerLost
from baton.common.sockets import Listener, hung_up, receive, send

TICK_S = 0.02


def test_the_handshake_has_one_deadline_however_slowly_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes well in time; all of them would take several times as long as is allowed."""
    monkeypatch.setattr(sockets, "HANDSHAKE_S", 10 * TICK_S)
    listener = Listener("127.0.0.1", 0, "secret", lambda _: None, "door")
    host, _, port = listener.address.partition(":")
    with socket.create_connection((host, int(port)), 5.0) as slow:
        slow.recv(16)
        for _ in range(47):  # one less than a whole answer
            time.sleep(TICK_S)
            try:
                slow.sendall(b"x")
            except OSError:
                break
        else:
            pytest.fail("it was listened to all the while")
    listener.close()


def test_a_message_has_one_deadline_and_the_socket_keeps_its_own() -> None:
    one, other = socket.socketpair()
    with one, other:
        one.settimeout(5.0)
        send(other, b"whole")
        assert receive(one, 100) == b"whole"
        assert one.gettimeout() == 5.0
        other.sendall(b"\x05\x00\x00\x00half")
        one.settimeout(2 * TICK_S)
        with pytest.raises(WorkerLost):
            receive(one, 100)
        assert one.gettimeout() == 2 * TICK_S


def test_a_socket_that_is_closed_while_somebody_waits_is_a_typed_error() -> None:
    one, other = socket.socketpair()
    one.settimeout(5 * TICK_S)
    closing = threading.Timer(TICK_S, one.close)
    closing.start()
    with other, pytest.raises(WorkerLost):
        receive(one, 100)
    closing.join()


def test_hanging_up_is_seen_behind_what_still_waits_and_nothing_is_read() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert not hung_up(one)
        send(other, b"last words")
        assert not hung_up(one)
        other.close()
        assert hung_up(one)
        assert receive(one, 100) == b"last words"
        assert hung_up(one)
