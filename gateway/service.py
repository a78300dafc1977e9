"""From a checked body to a running generation: the rules that need the model and the router."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass

from ..common.config import GatewayConfig
from ..common.errors import InvalidRequest, NotReady, PromptTooLong, UnknownModel
from ..common.types import SamplingParams
from .formats import ChatFormat, CompletionFormat, Envelope, Format
from .generation import Generation, Job, Prompt
from .ids import answer_id
from .metrics import Metrics
from .model import Model
from .ports import Router
from .reply import InFlight, Reply
from .schemas import (
    MAX_CHOICES,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    SamplingBody,
    TokenizeBody,
    for_template,
    sampling,
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: tenants never share caches. `received` is on `time.perf_counter`'s clock."""

    request_id: str
    tenant: str
    received: float


class Service:
    """What the routes call. `draining` is set when the process is told to stop: nothing new is taken then."""

    def __init__(self, config: GatewayConfig, model: Model, router: Router, metrics: Metrics) -> None:
        self.config = config
        self.model = model
        self.metrics = metrics
        self.draining = False
        self._router = router
        self._running = InFlight()

    def ready(self) -> tuple[str, str]:
        """State (loading, ready, draining, unhealthy) and the reason."""
        if self.draining:
            return "draining", f"the gateway is stopping; {self._running.count} requests are still running"
        return self._router.ready()

    async def chat(self, body: ChatBody, caller: Caller) -> Reply:
        """Raises `BatonError` for what cannot be served; so does `complete`."""
        self._admit(body.model)
        alternatives = body.alternatives()
        tokens = await self._chat_tokens(body)
        limit = body.max_completion_tokens or body.max_tokens
        prompt = Prompt(tokens, self._params(body, tokens, limit, alternatives, "messages"))
        return self._reply(ChatFormat(), "chatcmpl", body, [prompt], caller)

    async def complete(self, body: CompletionBody, caller: Caller) -> Reply:
        self._admit(body.model)
        texts = body.prompts()
        if len(texts) * (body.n or 1) > MAX_CHOICES:
            raise InvalidRequest(f"prompts × n must be at most {MAX_CHOICES}", param="prompt")
        prompts = []
        for text in texts:
            tokens = await self._prompt_tokens(text)
            prompts.append(Prompt(tokens, self._params(body, tokens, body.max_tokens, body.logprobs, "prompt")))
        return self._reply(CompletionFormat(), "cmpl", body, prompts, caller)

    async def tokenize(self, body: TokenizeBody) -> dict[str, object]:
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("exactly one of prompt and messages must be given", param="prompt")
        if body.messages is not None:
            tokens = await self._chat_tokens(body)
        else:
            tokens = await self.model.tokenizer.encode(body.prompt or "", special=body.add_special_tokens)
        return {"count": len(tokens), "max_model_len": self.model.max_model_len, "tokens": tokens}

    async def detokenize(self, body: DetokenizeBody) -> dict[str, object]:
        self._check_model(body.model)
        self._check_tokens(body.tokens, "tokens")
        return {"prompt": await asyncio.to_thread(self.model.tokenizer.decode, body.tokens)}

    async def drain(self) -> None:
        """Take nothing new and wait for what is running, as long as the configuration says."""
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_s):
                await self._running.idle.wait()

    # --- how ---

    def _admit(self, model: str) -> None:
        if self.draining:
            raise NotReady("the server is stopping", retry_after_s=5.0)
        self._check_model(model)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model.name:
            raise UnknownModel(f"the model {name!r} does not exist; this server has {self.model.name!r}", param="model")

    async def _chat_tokens(self, body: ChatBody | TokenizeBody) -> tuple[int, ...]:
        if self.model.template is None:
            raise InvalidRequest(
                f"{self.model.name} has no chat template (a base model); use /v1/completions", param="messages"
            )
        text = self.model.template.render(for_template(body.messages or []))
        return await self.model.tokenizer.encode(text, special=False)  # the template has written the special tokens

    async def _prompt_tokens(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await self.model.tokenizer.encode(prompt, special=True)
        self._check_tokens(prompt, "prompt")
        return tuple(prompt)

    def _check_tokens(self, tokens: list[int], param: str) -> None:
        if tokens and max(tokens) >= self.model.vocab_size:
            raise InvalidRequest(f"{param} has a token id not in 0..{self.model.vocab_size - 1}", param=param)

    def _params(
        self, body: SamplingBody, tokens: tuple[int, ...], limit: int | None, alternatives: int | None, param: str
    ) -> SamplingParams:
        """Sampling parameters for this prompt. Raises `PromptTooLong` with both lengths if it does not fit."""
        if not tokens:
            raise InvalidRequest(f"{param} is empty", param=param)
        context = self._context()
        room = context - len(tokens)
        if room < (limit or 1):
            wanted = f"{len(tokens)} prompt tokens" + (f" and {limit} output tokens" if limit else "")
            wrong = param if room < 1 else "max_tokens"
            raise PromptTooLong(f"{wrong}: the context has {context} tokens, and this needs {wanted}", param=wrong)
        return sampling(body, limit or room, alternatives, self.model.vocab_size)

    def _context(self) -> int:
        """Tokens of prompt and output together: what the model allows and the workers hold."""
        limits = self._router.limits()
        return min(self.model.max_model_len, limits.max_model_len) if limits else self.model.max_model_len

    def _reply(self, form: Format, prefix: str, body: SamplingBody, prompts: list[Prompt], caller: Caller) -> Reply:
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
        job = Job(
            request_id=caller.request_id,
            tenant=caller.tenant,
            received=caller.received,
            prompts=tuple(prompts),
            n=body.n or 1,
            stops=tuple(body.stop or ()),
            timeout_s=self.config.request_timeout_s,
        )
        envelope = Envelope(
            id=answer_id(prefix, caller.request_id),
            created=int(time.time()),
            model=self.model.name,
            spell=self.model.tokenizer.token_bytes,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            token_ids=bool(body.return_token_ids),
        )
        generation = Generation(job, self._router, self.model.tokenizer, self.model.eos_ids, self.metrics)
        backlog = self.config.max_stream_backlog
        return Reply(generation, form, envelope, stream=bool(body.stream), max_backlog=backlog, running=self._running)
