"""gRPC between Baton's processes: the paths of methods, the options of channels, the cluster token, typed streams.

Both ends of a bidirectional stream hold a `Stream` of our own types. A handler that raises a `BatonError` ends its
call with that error, and the caller's `read` raises the same. grpc is untyped; its `Any` stays in this file.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import grpc as _grpc

from ..common.errors import BatonError, DeadlineExceeded, Unauthorized, WorkerLost, from_code
from ..common.messages import CheckReport, Turn
from .convert import (
    CHECK_REPORT,
    EMPTY,
    FROM_ROUTER,
    FROM_SOURCE,
    FROM_TARGET,
    FROM_WORKER,
    RAW,
    TURN_ORDER,
    Codec,
    FromRouter,
    FromSource,
    FromTarget,
    FromWorker,
)

grpc: Any = _grpc

In = TypeVar("In")
Out = TypeVar("Out")
In_co = TypeVar("In_co", covariant=True)
Out_contra = TypeVar("Out_contra", contravariant=True)

SESSION = "/baton.v1.Worker/Session"
CONTROL = "/baton.v1.Worker/Control"
CHECK = "/baton.v1.Worker/Check"
TURN = "/baton.v1.Worker/TurnRole"
DATA = "/baton.v1.Transfer/Data"

TURN_GRACE_S = 2.0
"""What the answer to a `Turn` may take beyond the worker's own limit."""

MAX_MESSAGE = 64 << 20
"""Bytes of one message at most: a Submit of a million tokens, or the whole set of a worker's block hashes."""

_TOKEN_KEY = "baton-token"
_CODE_KEY = "baton-code"

_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_CHANNEL_OPTIONS = (
    *_OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # In spite of its name: how long a connection may take to stand. On a busy machine a process answers late.
    ("grpc.min_reconnect_backoff_ms", 2000),
    # Channels of one process to one address would otherwise share a connection, and a token's stream a bulk stream's.
    ("grpc.use_local_subchannel_pool", 1),
)
_SERVER_OPTIONS = (
    *_OPTIONS,
    # Two servers on one port would split the calls between them; the second must fail instead.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)

# --- streams --------------------------------------------------------------------------------------------------------


class Stream(Protocol[In_co, Out_contra]):
    """One end of a bidirectional stream. At most one `read` at a time; writes wait for each other."""

    async def read(self) -> In_co | None:
        """The next message; None once the other end has ended the stream well. Raises `InvalidRequest` where the
        message is malformed, and on the caller's end whatever ended the call: `WorkerLost` where the peer is gone."""
        ...

    async def write(self, message: Out_contra) -> None:
        """Waits while the peer does not read (HTTP/2 flow control). Raises `WorkerLost` where the stream is over."""
        ...


@dataclass(frozen=True, slots=True)
class _Served(Generic[In, Out]):
    """The server's end. When the caller goes away, grpc cancels the task that runs the handler."""

    context: Any
    incoming: Codec[In]
    outgoing: Codec[Out]
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def read(self) -> In | None:
        with _translated():
            data = await self.context.read()
        return None if data is grpc.aio.EOF else self.incoming.decode(data)

    async def write(self, message: Out) -> None:
        data = self.outgoing.encode(message)
        async with self.writing:
            with _translated():
                await self.context.write(data)


@dataclass(frozen=True, slots=True)
class CalledStream(Generic[In, Out]):
    """The caller's end."""

    call: Any
    incoming: Codec[In]
    outgoing: Codec[Out]
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def read(self) -> In | None:
        """See `Stream.read`."""
        with _translated():
            data = await self.call.read()
        return None if data is grpc.aio.EOF else self.incoming.decode(data)

    async def write(self, message: Out) -> None:
        """See `Stream.write`."""
        data = self.outgoing.encode(message)
        async with self.writing:
            with _translated():
                await self.call.write(data)

    async def done_writing(self) -> None:
        """Tell the other end that no more comes; what it still says can be read."""
        await self.call.done_writing()

    def cancel(self) -> None:
        """End the call at once, on both ends. Idempotent."""
        self.call.cancel()


# --- errors ---------------------------------------------------------------------------------------------------------


def _typed(error: Any) -> BatonError:
    """Our error for grpc's: the one that the peer's handler raised, where it was one of ours."""
    details = error.details() or "no details"
    for key, value in error.trailing_metadata() or ():
        if key == _CODE_KEY:
            return from_code(value, details)
    match error.code():
        case grpc.StatusCode.UNAUTHENTICATED:
            return Unauthorized(details)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(details)
        case code:
            return WorkerLost(f"{code.name.lower()}: {details}")


@contextmanager
def _translated() -> Iterator[None]:
    """Around an operation of grpc: what it raises becomes ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise _typed(error) from error
    except (grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError) as error:
        raise WorkerLost(f"the stream is over: {error}") from error
    except asyncio.CancelledError as error:
        # grpc raises it as well where the call, and not this task, was cancelled.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise WorkerLost("the call was cancelled") from error


async def _abort(context: Any, error: BatonError) -> None:
    await context.abort(grpc.StatusCode.ABORTED, error.message, ((_CODE_KEY, error.code),))


# --- servers --------------------------------------------------------------------------------------------------------

Handlers = Mapping[str, Any]
"""Path of a method → grpc's handler of it."""


class WorkerService(Protocol):
    """What a worker answers. `session` and `control` run for as long as their stream lives."""

    async def session(self, stream: Stream[FromRouter, FromWorker]) -> None: ...
    async def control(self, stream: Stream[FromSource, FromTarget]) -> None: ...
    async def check(self) -> CheckReport: ...
    async def turn(self, order: Turn) -> None: ...


def stream_handler(
    serve: Callable[[Stream[In, Out]], Awaitable[None]], incoming: Codec[In], outgoing: Codec[Out]
) -> Any:
    """grpc's handler of a bidirectional stream."""

    async def handle(_: Any, context: Any) -> None:
        try:
            stream: _Served[In, Out] = _Served(context, incoming, outgoing)
            await serve(stream)
        except BatonError as error:
            await _abort(context, error)

    return grpc.stream_stream_rpc_method_handler(handle)


def call_handler(serve: Callable[[In], Awaitable[Out]], incoming: Codec[In], outgoing: Codec[Out]) -> Any:
    """grpc's handler of one question and one answer."""

    async def handle(data: bytes, context: Any) -> bytes:
        try:
            return outgoing.encode(await serve(incoming.decode(data)))
        except BatonError as error:
            await _abort(context, error)
            raise  # never reached: abort raises

    return grpc.unary_unary_rpc_method_handler(handle)


def worker_handlers(service: WorkerService) -> Handlers:
    """Session, Control, Check and Turn of a worker."""
    return {
        SESSION: stream_handler(service.session, FROM_ROUTER, FROM_WORKER),
        CONTROL: stream_handler(service.control, FROM_SOURCE, FROM_TARGET),
        CHECK: call_handler(lambda _: service.check(), EMPTY, CHECK_REPORT),
        TURN: call_handler(service.turn, TURN_ORDER, EMPTY),
    }


def data_handlers(serve: Callable[[Stream[bytes, bytes]], Awaitable[None]]) -> Handlers:
    """The way of KV payloads: a stream of bytes each way, as they are."""
    return {DATA: stream_handler(serve, RAW, RAW)}


def watch_handler(serve: Callable[[], AsyncIterator[Out]], outgoing: Codec[Out]) -> Any:
    """grpc's handler of a stream that only the server speaks on."""

    async def handle(_: bytes, context: Any) -> None:
        try:
            async for value in serve():
                await context.write(outgoing.encode(value))
        except BatonError as error:
            await _abort(context, error)

    return grpc.unary_stream_rpc_method_handler(handle)


@dataclass(frozen=True, slots=True)
class _Door:
    """Finds the handler of a call, once its cluster token is right. Has the shape of grpc's GenericRpcHandler."""

    token: bytes
    handlers: Handlers

    def service(self, call: Any) -> Any:
        given = b"".join(
            value.encode() if isinstance(value, str) else value
            for key, value in call.invocation_metadata
            if key == _TOKEN_KEY
        )
        if hmac.compare_digest(given, self.token):
            return self.handlers.get(call.method)
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(_: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster token is missing or wrong")


def make_server(cluster_token: str, *handlers: Handlers) -> Any:
    """A `grpc.aio.Server` that is not started and listens nowhere yet; use `listen`, then `start()`."""
    server = grpc.aio.server(options=_SERVER_OPTIONS)
    merged = {path: handler for some in handlers for path, handler in some.items()}
    server.add_generic_rpc_handlers((_Door(cluster_token.encode(), merged),))
    return server


def listen(server: Any, host: str, port: int) -> str:
    """Bind to host:port (0: any free port). Returns the address. Raises `RuntimeError` where the port is taken."""
    return f"{host}:{server.add_insecure_port(f'{host}:{port}')}"


# --- clients --------------------------------------------------------------------------------------------------------


class Peer:
    """A channel to another process of the cluster, and the calls that can be made over it.

    Nothing is connected before the first call. Every call fails at once with `WorkerLost` while there is no
    connection; a unary call raises `DeadlineExceeded` after `timeout_s`.
    """

    def __init__(self, address: str, cluster_token: str) -> None:
        self.address = address
        self._channel: Any = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._metadata = ((_TOKEN_KEY, cluster_token),)

    def session(self) -> CalledStream[FromWorker, FromRouter]:
        """Router → worker: requests down, tokens up."""
        return self.stream(SESSION, FROM_WORKER, FROM_ROUTER)

    def control(self) -> CalledStream[FromTarget, FromSource]:
        """Source → target: the control messages of handovers."""
        return self.stream(CONTROL, FROM_TARGET, FROM_SOURCE)

    def data(self) -> CalledStream[bytes, bytes]:
        """Source → target: KV payloads."""
        return self.stream(DATA, RAW, RAW)

    async def check(self, timeout_s: float) -> CheckReport:
        """The worker's own account of its blocks."""
        return await self.call(CHECK, None, EMPTY, CHECK_REPORT, timeout_s)

    async def turn(self, order: Turn) -> None:
        """Change the worker's role. Raises what the worker refuses with."""
        await self.call(TURN, order, TURN_ORDER, EMPTY, order.within_s + TURN_GRACE_S)

    async def close(self) -> None:
        """End all calls and the connection. Idempotent."""
        await self._channel.close()

    def stream(self, path: str, incoming: Codec[In], outgoing: Codec[Out]) -> CalledStream[In, Out]:
        """Open a bidirectional stream."""
        call = self._channel.stream_stream(path)(metadata=self._metadata)
        return CalledStream(call, incoming, outgoing)

    async def call(self, path: str, value: In, sent: Codec[In], got: Codec[Out], timeout_s: float) -> Out:
        """One question, one answer."""
        call = self._channel.unary_unary(path)
        with _translated():
            data = await call(sent.encode(value), metadata=self._metadata, timeout=timeout_s)
        return got.decode(data)

    async def watch(self, path: str, got: Codec[Out]) -> AsyncIterator[Out]:
        """What the other end says, until it ends. Raises as `Stream.read` does."""
        call = self._channel.unary_stream(path)(EMPTY.encode(None), metadata=self._metadata)
        try:
            while True:
                with _translated():
                    data = await call.read()
                if data is grpc.aio.EOF:
                    return
                yield got.decode(data)
        finally:
            call.cancel()
