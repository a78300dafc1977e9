"""Streams, calls, errors and the cluster token over real gRPC on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from baton.common.cluster import (
    End,
    FromController,
    FromGateway,
    GatewayHello,
    Launch,
    LogLines,
    LogQuestion,
    Members,
    Phase,
    Processes,
    ProcessStatus,
    TraceAnswer,
    TraceQuestion,
    Traffic,
    WorkerState,
    WorkerStatus,
)
from baton.common.errors import DeadlineExceeded, InvalidRequest, StaleEpoch, Unauthorized, WorkerLost
from baton.common.kv_format import KvFormat
from baton.common.messages import CheckReport, Endpoint, Hello, Ping, StepReport, Turn
from baton.common.types import WorkerRef
from baton.protos import rpc
from baton.protos.control import ControllerClient, ParentClient, controller_handlers, parent_handlers
from baton.protos.convert import RAW, FromRouter, FromSource, FromTarget, FromWorker
from baton.protos.rpc import Peer, Stream

TOKEN = "secret"


def end(name: str) -> Endpoint:
    return Endpoint(WorkerRef(name, "a", 1), "f", KvFormat(1, 2, 3, 4, "int8", tp=2), "host", ({"tcp": "b"}, {}))


class EchoWorker:
    """Answers each message of a session with an empty report, and notes when a handler ended."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.check_delay = 0.0
        self.role = "prefill"

    async def session(self, stream: Stream[FromRouter, FromWorker]) -> None:
        try:
            match await stream.read():
                case Hello(worker_epoch=epoch) if epoch != 7:
                    raise StaleEpoch(f"I am 7, not {epoch}")
            while await stream.read() is not None:
                await stream.write(StepReport())
        finally:
            self.ended.set()

    async def control(self, stream: Stream[FromSource, FromTarget]) -> None:
        hello = await stream.read()
        assert isinstance(hello, Endpoint)
        await stream.write(end("target"))

    async def check(self) -> CheckReport:
        await asyncio.sleep(self.check_delay)
        return CheckReport(ok=True, total_blocks=5)

    async def turn(self, order: Turn) -> None:
        if order.role == "cook":
            raise InvalidRequest("no such role")
        self.role = order.role


class OneWorkerController:
    def __init__(self) -> None:
        self.reported: list[WorkerStatus] = []

    async def report(self, status: WorkerStatus) -> None:
        if status.name == "stale":
            raise StaleEpoch("there is a newer one")
        self.reported.append(status)

    async def attend(self, stream: Stream[FromGateway, FromController]) -> None:
        assert isinstance(await stream.read(), GatewayHello)
        await stream.write(Members(1, tuple(self.reported)))
        while isinstance(message := await stream.read(), Traffic):
            await stream.write(TraceQuestion(message.arrived, "r"))
        assert isinstance(message, TraceAnswer)


class NoteParent:
    """Notes what it is told, and answers with it."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.saved = b""

    async def launch(self, order: Launch) -> None:
        if order.kind == "cake":
            raise InvalidRequest("no such kind of process")
        self.told.append(order)

    async def end(self, order: End) -> None:
        self.told.append(order)

    async def watch(self) -> AsyncIterator[Processes]:
        yield Processes(1)
        yield Processes(2, (ProcessStatus("decode-0", Phase.WAITING, last_lines=("killed",)),))

    async def tail(self, question: LogQuestion) -> LogLines:
        return LogLines(question.after + 2, (question.name, str(question.limit)))

    async def save(self, data: bytes) -> None:
        self.saved = data

    async def load(self) -> bytes:
        return self.saved


@asynccontextmanager
async def served(*handlers: rpc.Handlers, token: str = TOKEN) -> AsyncIterator[Peer]:
    server = rpc.make_server(TOKEN, *handlers)
    address = rpc.listen(server, "127.0.0.1", 0)
    await server.start()
    peer = Peer(address, token)
    try:
        yield peer
    finally:
        await peer.close()
        await server.stop(1)


async def test_a_session_carries_own_types_both_ways_and_ends_well() -> None:
    worker = EchoWorker()
    async with served(rpc.worker_handlers(worker)) as peer:
        stream = peer.session()
        await stream.write(Hello("r", 1, 7))
        await stream.write(Ping())
        assert await stream.read() == StepReport()
        await stream.done_writing()
        assert await stream.read() is None


async def test_an_error_of_the_handler_is_raised_by_the_caller() -> None:
    async with served(rpc.worker_handlers(EchoWorker())) as peer:
        stream = peer.session()
        await stream.write(Hello("r", 1, 8))
        with pytest.raises(StaleEpoch, match="I am 7, not 8"):
            await stream.read()


async def test_a_caller_that_goes_away_ends_the_handler() -> None:
    worker = EchoWorker()
    async with served(rpc.worker_handlers(worker)) as peer:
        stream = peer.session()
        await stream.write(Hello("r", 1, 7))
        await stream.write(Ping())
        await stream.read()
        stream.cancel()
        await asyncio.wait_for(worker.ended.wait(), 5)


async def test_malformed_bytes_end_the_call_with_a_typed_error() -> None:
    async with served(rpc.worker_handlers(EchoWorker())) as peer:
        stream = peer.stream(rpc.SESSION, RAW, RAW)
        await stream.write(b"\xff\xff")
        with pytest.raises(InvalidRequest, match="FromRouter"):
            await stream.read()


@pytest.mark.parametrize("token", ["", "secre", "secret2"])
async def test_calls_without_the_right_token_are_refused(token: str) -> None:
    worker = EchoWorker()
    handlers = rpc.worker_handlers(worker), controller_handlers(OneWorkerController()), parent_handlers(NoteParent())
    async with served(*handlers, token=token) as peer:
        with pytest.raises(Unauthorized):
            await peer.check(5)
        with pytest.raises(Unauthorized):
            await peer.session().read()
        with pytest.raises(Unauthorized):
            await ControllerClient(peer).attend().read()
        with pytest.raises(Unauthorized):
            await anext(ParentClient(peer).watch())
        assert not worker.ended.is_set()


async def test_controller_calls() -> None:
    controller = OneWorkerController()
    status = WorkerStatus("w", "decode", WorkerState.READY, "127.0.0.1:1", 2**63, 1.0)
    async with served(controller_handlers(controller)) as peer:
        client = ControllerClient(peer)
        await client.report(status, 5)
        with pytest.raises(StaleEpoch):
            await client.report(WorkerStatus("stale", "decode", WorkerState.READY), 5)
        stream = client.attend()
        await stream.write(GatewayHello("gateway-0", "http://127.0.0.1:8000", 3))
        assert await stream.read() == Members(1, (status,))
        await stream.write(Traffic(1.0, arrived=7))
        assert await stream.read() == TraceQuestion(7, "r")
        await stream.write(TraceAnswer(7, None))
        assert await stream.read() is None


async def test_parent_calls() -> None:
    parent = NoteParent()
    launch = Launch("decode-0", "worker", b"{}", 2, b"{}", "digest")
    async with served(parent_handlers(parent)) as peer:
        client = ParentClient(peer)
        await client.launch(launch)
        await client.end(End("decode-0", 5.0))
        assert parent.told == [launch, End("decode-0", 5.0)]
        with pytest.raises(InvalidRequest, match="no such kind"):
            await client.launch(Launch("x", "cake", b"", 1, b"", ""))
        known = [processes async for processes in client.watch()]
        assert known == [
            Processes(1),
            Processes(2, (ProcessStatus("decode-0", Phase.WAITING, last_lines=("killed",)),)),
        ]
        assert await client.tail(LogQuestion("decode-0", 40, 10)) == LogLines(42, ("decode-0", "10"))
        assert await client.load() == b""
        await client.save(b"\x00state")
        assert await client.load() == b"\x00state"


async def test_a_worker_is_told_to_turn() -> None:
    worker = EchoWorker()
    async with served(rpc.worker_handlers(worker)) as peer:
        await peer.turn(Turn("decode", 1.0))
        assert worker.role == "decode"
        with pytest.raises(InvalidRequest, match="no such role"):
            await peer.turn(Turn("cook", 1.0))


async def test_control_and_check() -> None:
    worker = EchoWorker()
    async with served(rpc.worker_handlers(worker)) as peer:
        assert await peer.check(5) == CheckReport(ok=True, total_blocks=5)
        stream = peer.control()
        await stream.write(end("source"))
        assert await stream.read() == end("target")
        assert await stream.read() is None
        worker.check_delay = 30
        with pytest.raises(DeadlineExceeded):
            await peer.check(0.05)


async def test_payload_bytes_travel_as_they_are() -> None:
    async def echo(stream: Stream[bytes, bytes]) -> None:
        while (data := await stream.read()) is not None:
            await stream.write(data)

    async with served(rpc.data_handlers(echo)) as peer:
        stream = peer.data()
        for payload in (b"", b"\x00\xff", b"x" * (1 << 20)):
            await stream.write(payload)
            assert await stream.read() == payload


async def test_nobody_there_is_a_lost_worker() -> None:
    server = rpc.make_server(TOKEN)
    address = rpc.listen(server, "127.0.0.1", 0)
    await server.stop(0)
    peer = Peer(address, TOKEN)
    with pytest.raises(WorkerLost):
        await peer.check(5)
    with pytest.raises(WorkerLost):
        await peer.session().write(Ping())
    await peer.close()


@pytest.mark.parametrize("end", ["cancel", "close", "stop"])
async def test_a_stream_that_is_over_says_so_on_both_calls(end: str) -> None:
    worker = EchoWorker()
    server = rpc.make_server(TOKEN, rpc.worker_handlers(worker))
    peer = Peer(rpc.listen(server, "127.0.0.1", 0), TOKEN)
    await server.start()
    stream = peer.session()
    await stream.write(Hello("r", 1, 7))
    await stream.write(Ping())
    await stream.read()
    waiting = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    match end:
        case "cancel":
            stream.cancel()
        case "close":
            await peer.close()
        case "stop":
            await server.stop(0)
    with pytest.raises(WorkerLost):
        await waiting
    for _ in range(2):
        with pytest.raises(WorkerLost):
            await stream.write(Ping())
        with pytest.raises(WorkerLost):
            await stream.read()
    await asyncio.wait_for(worker.ended.wait(), 5)
    await peer.close()
    await server.stop(0)


async def test_writes_at_the_same_time_wait_for_each_other() -> None:
    async with served(rpc.worker_handlers(EchoWorker())) as peer:
        stream = peer.session()
        await stream.write(Hello("r", 1, 7))
        await asyncio.gather(*(stream.write(Ping()) for _ in range(20)))
        assert [await stream.read() for _ in range(20)] == [StepReport()] * 20


async def test_a_reader_that_is_cancelled_is_cancelled() -> None:
    async with served(rpc.worker_handlers(EchoWorker())) as peer:
        stream = peer.session()
        await stream.write(Hello("r", 1, 7))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await stream.read()


async def test_a_process_that_is_slow_to_answer_a_connection_is_not_taken_for_gone() -> None:
    """A busy machine: the kernel accepts at once, the process comes round to it half a second later."""
    worker = EchoWorker()
    async with served(rpc.worker_handlers(worker)) as peer:
        host, port = peer.address.split(":")

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(0.5)
            behind, onward = await asyncio.open_connection(host, int(port))
            await asyncio.gather(_copy(reader, onward), _copy(behind, writer))

        front = await asyncio.start_server(relay, "127.0.0.1", 0)
        slow = Peer("{}:{}".format(*front.sockets[0].getsockname()), TOKEN)
        try:
            assert (await slow.check(timeout_s=5)).ok
        finally:
            await slow.close()
            front.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
    writer.close()
