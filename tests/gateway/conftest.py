"""A tiny model folder, a router that plays a script, and a real server on loopback."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest
import tokenizers
import uvicorn
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from baton.common.config import GatewayConfig
from baton.common.errors import BatonError
from baton.common.messages import TokenOut
from baton.common.types import FinishReason, Request, Timeline, TokenLogprob, Usage
from baton.gateway.app import build
from baton.gateway.metrics import Metrics
from baton.gateway.model import Model
from baton.gateway.service import Service
from baton.router.request import Batch, Finish

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today?",
    "Bäume wachsen langsam; il était une fois; 東京は日本の首都です。 😀🎉 emoji",
    "def main():\n    return {'a': 1, \"b\": [2, 3]}\n",
]


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE with a few merges, so that most non-ASCII characters are spread over several tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|bos|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<think>", "< plain added >", "<ünï>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    return tokenizer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"vocab_size": 512, "max_position_embeddings": 256, "eos_token_id": tokenizer.token_to_id("<|end|>")}
    (folder / "config.json").write_text(json.dumps(config))
    names = {"bos_token": "<|bos|>", "eos_token": {"content": "<|end|>"}, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


class FakeStream:
    """Plays batches; behaves at `cancel` as the router's stream does."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = False
        self.sent = 0
        self._fresh: list[TokenOut] = []
        self._outcome: Finish | BatonError | None = None
        self._news = asyncio.Event()

    @property
    def backlog(self) -> int:
        return len(self._fresh)

    async def next(self) -> Batch:
        while not self._fresh and self._outcome is None:
            self._news.clear()
            await self._news.wait()
        tokens, self._fresh = self._fresh, []
        if isinstance(self._outcome, BatonError):
            if not tokens:
                raise self._outcome
            return Batch(tokens)
        return Batch(tokens, self._outcome)

    def cancel(self) -> None:
        if self._outcome is None:
            self.cancelled = True
            self.finish(FinishReason.CANCELLED)

    def emit(self, *tokens: int) -> None:
        for token in tokens:
            if self._outcome is not None or self.sent >= self.request.params.max_tokens:
                break
            position = self.request.prompt_len + self.sent
            wanted = self.request.params.logprobs
            top = tuple((other, -1.0 - other) for other in range(wanted or 0))
            logprob = TokenLogprob(-0.5, top) if wanted is not None else None
            self._fresh.append(TokenOut(1, position, token, logprob))
            self.sent += 1
        if self.sent >= self.request.params.max_tokens:
            self.finish(FinishReason.LENGTH)
        self._news.set()

    def finish(self, reason: FinishReason) -> None:
        usage = Usage(self.request.prompt_len, min(16, self.request.prompt_len), self.sent)
        timeline = Timeline(routed=0.001, prefill_start=0.002, first_token=0.003, last_token=0.004)
        self._end(Finish(reason, usage, timeline))

    def fail(self, error: BatonError) -> None:
        self._end(error)

    def _end(self, outcome: Finish | BatonError) -> None:
        if self._outcome is None:
            self._outcome = outcome
        self._news.set()


Script = Callable[[FakeStream], None]


@dataclass
class FakeRouter:
    """`script` is called with each new stream; `refusal` is raised at the door."""

    script: Script = lambda stream: None
    refusal: BatonError | None = None
    state: tuple[str, str] = ("ready", "2 workers")
    streams: list[FakeStream] = field(default_factory=list)

    def submit(self, request: Request) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        stream = FakeStream(request)
        self.streams.append(stream)
        self.script(stream)
        return stream

    def ready(self) -> tuple[str, str]:
        return self.state

    def limits(self) -> None:
        return None


class FakeNumbers(Collector):
    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily("baton_fake", "A number of the router.", value=7)


@dataclass
class Gateway:
    """A gateway around a fake router."""

    service: Service
    router: FakeRouter
    app: ASGIApp

    def says(self, text: str, *, end: bool = True, pieces: int = 0) -> None:
        """Every request is answered with `text`, in batches of `pieces` tokens (0: all at once)."""
        tokens = self.tokens(text)
        eos = min(self.service.model.eos_ids)

        def script(stream: FakeStream) -> None:
            async def play() -> None:
                for start in range(0, len(tokens), pieces):
                    stream.emit(*tokens[start : start + pieces])
                    await asyncio.sleep(0)
                finish()

            def finish() -> None:
                if end and stream.sent < stream.request.params.max_tokens:
                    stream.emit(eos)
                    stream.finish(FinishReason.STOP)

            if pieces:
                tasks.append(asyncio.get_running_loop().create_task(play()))
            else:
                stream.emit(*tokens)
                finish()

        tasks: list[asyncio.Task[None]] = []
        self.router.script = script

    def tokens(self, text: str) -> tuple[int, ...]:
        return self.service.model.tokenizer._encode(text, False)


MakeGateway = Callable[..., Gateway]


@pytest.fixture
def make_gateway(model_dir: Path) -> MakeGateway:
    def make(**changes: object) -> Gateway:
        config = replace(GatewayConfig(model=str(model_dir), model_name="tiny"), **changes)  # type: ignore[arg-type]
        router = FakeRouter()
        service = Service(config, Model.load(config), router, Metrics("gateway-0", FakeNumbers()))
        return Gateway(service, router, build(service))

    return make


@pytest.fixture
def gateway(make_gateway: MakeGateway) -> Gateway:
    return make_gateway()


@pytest.fixture
async def http(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(gateway) as client:
        yield client


def client_of(gateway: Gateway, **options: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(gateway.app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway", **options)  # type: ignore[arg-type]


@contextmanager
def serve(gateway: Gateway) -> Iterator[str]:
    """The gateway on a real socket, its loop in a thread of its own; its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        gateway.app, lifespan="off", log_level="critical", loop="uvloop", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def served(gateway: Gateway) -> Iterator[str]:
    with serve(gateway) as address:
        yield address
