"""One output of a request: from the router's tokens to the text that may be shown."""

from __future__ import annotations

from ..common.messages import TokenOut
from ..common.types import FinishReason, SamplingParams, Timeline, Usage
from ..router.request import Batch, Finish
from .ports import RequestStream
from .stops import StopMatcher
from .tokenizer import Detokenizer

Shown = list[tuple[TokenOut, str]]
"""Tokens, and the text that each of them makes certain: "" where it has to wait for the next."""


class Choice:
    """The output with number `index`. `hidden` are tokens that end a text and are no part of it.

    `end` is the text that was held back until the end; `finish_reason` is None until then.
    """

    __slots__ = (
        "_detokenizer",
        "_hidden",
        "_min_tokens",
        "_stops",
        "completion_tokens",
        "end",
        "finish_reason",
        "index",
        "params",
        "prompt",
        "stream",
        "timeline",
        "usage",
    )

    def __init__(
        self,
        index: int,
        prompt: tuple[int, ...],
        params: SamplingParams,
        stops: tuple[str, ...],
        eos_ids: frozenset[int],
        detokenizer: Detokenizer,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.params = params
        self.stream: RequestStream | None = None
        self.completion_tokens = 0
        self.end = ""
        self.finish_reason: FinishReason | None = None
        self.usage = Usage(prompt_tokens=len(prompt))
        self.timeline = Timeline()
        self._stops = StopMatcher(stops) if stops else None
        self._hidden = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
        self._min_tokens = params.min_tokens
        self._detokenizer = detokenizer

    def feed(self, batch: Batch) -> Shown:
        """Take what has arrived. Tokens after a stop string are dropped."""
        shown: Shown = []
        push, stops, hidden = self._detokenizer.push, self._stops, self._hidden
        for out in batch.tokens:
            self.completion_tokens += 1
            early = self.completion_tokens < self._min_tokens
            if out.token in hidden and not early:
                continue
            text = push(out.token)
            if stops is not None and not early:
                text = stops.push(text)
                shown.append((out, text))
                if stops.matched:
                    self.finish_reason = FinishReason.STOP
                    return shown
            else:
                shown.append((out, text))
        if batch.finish is not None:
            self._finish(batch.finish.reason)
        return shown

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        rest = self._detokenizer.flush()
        if self._stops is not None:
            rest = self._stops.push(rest)
            if self._stops.matched:
                self.finish_reason = FinishReason.STOP
            rest += self._stops.flush()
        self.end = rest

    def account(self, finish: Finish) -> None:
        """Keep the router's account of the request. The output is counted here, as the client has it."""
        self.usage = finish.usage
        self.timeline = finish.timeline

    def cancel(self) -> None:
        """Free what the request holds, wherever it is."""
        if self.stream is not None:
            self.stream.cancel()
