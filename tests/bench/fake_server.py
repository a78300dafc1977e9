"""A tiny OpenAI-compatible server: streams as many events as it is asked for tokens, at a fixed pace, and fails on
demand. Which failure is chosen by the model's name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


def _event(data: Any) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return f"data: {text}\n\n".encode()


class FakeServer:
    def __init__(self, first_s: float = 0.0, gap_s: float = 0.0) -> None:
        self.first_s, self.gap_s = first_s, gap_s
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.connections = 0
        self.total = 0
        self.in_flight = 0
        self.most_in_flight = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                length = next(int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length"))
                body = await reader.readexactly(length)
                if not await self.answer(lines[0].split()[1], body, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        if path == "/v1/models":
            self.plain(writer, 200, {"data": [{"id": "fake"}]})
            return True
        if path == "/metrics":
            self.total += 1000
            self.plain(writer, 200, f'x 1\nbaton_handover_bytes_total{{worker="a"}} {self.total}\n')
            return True
        request = json.loads(body)
        self.bodies.append(request)
        if request["model"] == "busy":
            self.plain(writer, 429, {"error": {"message": "full"}})
            return True
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        alive = await self.stream(request, writer, chat=path.endswith("/chat/completions"))
        self.in_flight -= 1
        return alive

    def plain(self, writer: asyncio.StreamWriter, status: int, data: Any) -> None:
        body = (data if isinstance(data, str) else json.dumps(data)).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)

    async def stream(self, request: dict[str, Any], writer: asyncio.StreamWriter, chat: bool) -> bool:
        def send(data: bytes) -> None:
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        count = request["max_tokens"] - (request["model"] == "short")
        if chat:
            send(_event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
        for i in range(count):
            await asyncio.sleep(self.gap_s if i else self.first_s)
            if request["model"] == "dies" and i == 2:
                writer.transport.abort()
                return False
            event = _event({"choices": [{"delta": {"content": f"w{i}"}} if chat else {"text": f"w{i}"}]})
            send(event[:9])  # cut inside the event: the reader has to put it together
            send(event[9:])
        if request["model"] == "breaks":
            send(_event({"error": {"message": "lost", "code": "worker_lost"}}))
        usage = {"prompt_tokens": 7, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 3}}
        send(_event({"choices": [], "usage": usage, "timeline": {"first_token": 0.5}}))
        send(_event("[DONE]"))
        writer.write(b"0\r\n\r\n")
        return True


@asynccontextmanager
async def fake_server(first_s: float = 0.0, gap_s: float = 0.0) -> AsyncIterator[FakeServer]:
    fake = FakeServer(first_s, gap_s)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    fake.url = f"http://{host}:{port}"
    try:
        yield fake
    finally:
        server.close()
