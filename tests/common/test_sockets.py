import socket
import threading
import time

import pytest

from baton.common.errors import HandoverFailed, Unauthorized, WorkerLost
from baton.common.sockets import Listener, connect, limit_waits, receive, receive_exactly, send, send_all


def echo(connection: socket.socket) -> None:
    while True:
        send(connection, receive(connection, 1 << 20))


@pytest.fixture
def door():
    listener = Listener("127.0.0.1", 0, "secret", echo, "echo")
    yield listener
    listener.close()


def test_messages_keep_their_borders(door: Listener) -> None:
    with connect(door.address, "secret") as peer:
        for parts in (
            (b"",),
            (b"a", b"", b"bc"),
            (bytes(300_000), memoryview(b"end")),
            tuple(b"x" for _ in range(2000)),
        ):
            send(peer, *parts)
            assert receive(peer, 1 << 20) == b"".join(parts)


def congestion_control(connection: socket.socket) -> bytes:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


@pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="only Linux lets a socket choose")
@pytest.mark.parametrize(("host", "within"), [("127.0.0.1", True), ("127.0.0.2", False)])
def test_congestion_is_controlled_as_the_system_has_it_but_within_a_host(host: str, within: bool) -> None:
    """127.0.0.2 is reached from 127.0.0.1, as another host would be."""
    listener = Listener(host, 0, "secret", echo, "echo")
    try:
        with connect(listener.address, "secret") as peer, socket.socket() as untouched:
            assert congestion_control(peer) == (b"reno" if within else congestion_control(untouched))
    finally:
        listener.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="only Linux lets a socket choose")
def test_where_the_system_does_not_leave_the_choice_a_connection_is_made_all_the_same(
    door: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Confined(socket.socket):
        refused = 0

        def setsockopt(self, level: int, option: int, *value: object) -> None:
            if (level, option) == (socket.IPPROTO_TCP, socket.TCP_CONGESTION):
                Confined.refused += 1
                raise PermissionError(1, "Operation not permitted")
            super().setsockopt(level, option, *value)

    monkeypatch.setattr(socket, "socket", Confined)
    with connect(door.address, "secret") as peer:
        send(peer, b"hello")
        assert receive(peer, 100) == b"hello"
    assert Confined.refused == 1


@pytest.mark.parametrize("address", ["a..b:1", "a\0b:1", "::1:1", "127.0.0.1:x", "127.0.0.1:99999", "127.0.0.1"])
def test_an_address_that_can_be_none_is_one_where_nobody_answers(address: str) -> None:
    with pytest.raises(WorkerLost, match="does not answer"):
        connect(address, "secret", 1.0)


def test_wrong_token_is_refused_on_both_ends(door: Listener) -> None:
    with pytest.raises((Unauthorized, WorkerLost)):
        connect(door.address, "guess")
    with connect(door.address, "secret") as peer:  # and the door still serves others
        send(peer, b"hello")
        assert receive(peer, 100) == b"hello"


def test_a_server_that_does_not_know_the_token_is_not_believed() -> None:
    def impostor(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(bytes(16))
            receive_exactly(connection, memoryview(bytearray(48)))
            connection.sendall(bytes(32))

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=impostor, args=(server,))
        thread.start()
        with pytest.raises(Unauthorized):
            connect(f"127.0.0.1:{server.getsockname()[1]}", "secret")
        thread.join()


def test_too_long_a_message_is_refused(door: Listener) -> None:
    with connect(door.address, "secret") as peer:
        send(peer, b"four")
        with pytest.raises(HandoverFailed):
            receive(peer, 3)


def test_silence_and_hanging_up_are_typed(door: Listener) -> None:
    with connect(door.address, "secret") as peer:
        peer.settimeout(0.05)
        with pytest.raises(WorkerLost):
            receive(peer, 100)  # nobody speaks
        door.close()
        peer.settimeout(5.0)
        with pytest.raises(WorkerLost):
            receive(peer, 100)
    with pytest.raises(WorkerLost):
        connect(door.address, "secret")


def test_a_reader_that_stalls_costs_a_timeout_and_not_a_hang(door: Listener) -> None:
    with connect(door.address, "secret") as peer:
        peer.settimeout(0.2)
        with pytest.raises(WorkerLost):
            for _ in range(200):  # the echo blocks on answers that nobody reads
                send_all(peer, (1 << 20).to_bytes(4, "little"), bytes(1 << 20))


def test_the_system_bounds_waits_as_well(door: Listener) -> None:
    with connect(door.address, "secret") as peer:
        limit_waits(peer, sending=0.5, receiving=0.5)
        send(peer, bytes(300_000))
        assert receive(peer, 1 << 20) == bytes(300_000)
        with pytest.raises(WorkerLost):
            receive(peer, 100)  # nobody speaks
        with pytest.raises(WorkerLost):
            for _ in range(200):  # nobody reads
                send_all(peer, (1 << 20).to_bytes(4, "little"), bytes(1 << 20))


def test_who_sends_a_byte_now_and_then_does_not_hold_the_reader_for_ever() -> None:
    one, other = socket.socketpair()
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.03):
            other.send(b"x")

    with one, other:
        limit_waits(one, sending=0, receiving=0.1)
        dripping = threading.Thread(target=drip)
        dripping.start()
        with pytest.raises(WorkerLost):
            receive_exactly(one, memoryview(bytearray(100)))
        over.set()
        dripping.join()


def test_closing_waits_for_those_who_serve() -> None:
    ended = []

    def serve(connection: socket.socket) -> None:
        try:
            receive(connection, 100)
        finally:
            time.sleep(0.05)
            ended.append(connection)

    listener = Listener("127.0.0.1", 0, "secret", serve, "slow")
    with connect(listener.address, "secret"), connect(listener.address, "secret"):
        listener.close()
        assert len(ended) == 2
