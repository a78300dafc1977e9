"""OpenAI's two wire formats, chat and plain completions: whole bodies, and the events of a stream.

The text of an event changes with each token and the rest does not, so the rest is encoded once for each choice; an
event is then two concatenations around the escaped text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from ..common.messages import TokenOut
from ..common.types import TokenLogprob, Usage
from .choice import Choice, Shown

DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode

_LOWEST = -9999.0
"""Stands for a log-probability of minus infinity, which JSON cannot say."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all parts of one answer have in common. `spell` gives the bytes of a token."""

    id: str
    created: int
    model: str
    spell: Callable[[int], bytes]
    include_usage: bool = False
    token_ids: bool = False


class Format(Protocol):
    """One of the two formats."""

    kind: str
    chunk_kind: str

    def text_field(self) -> tuple[bytes, bytes]:
        """What stands before and after the escaped text in an event's choice."""
        ...

    def opening(self, index: int) -> bytes:
        """The part of a choice's first event that comes before any token; b"" for none."""
        ...

    def message(self, text: str) -> dict[str, Any]:
        """The fields of a whole choice that hold its text."""
        ...

    def logprobs(self, entries: Sequence[tuple[TokenOut, int]], spell: Callable[[int], bytes]) -> dict[str, Any]:
        """Log-probabilities of tokens, each with the offset of its text."""
        ...


class ChatFormat:
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def text_field(self) -> tuple[bytes, bytes]:
        return b'"delta":{"content":', b"}"

    def opening(self, index: int) -> bytes:
        return b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index

    def message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, entries: Sequence[tuple[TokenOut, int]], spell: Callable[[int], bytes]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            data = spell(token)
            return {"token": data.decode(errors="replace"), "logprob": max(logprob, _LOWEST), "bytes": list(data)}

        content = []
        for out, _ in entries:
            found = out.logprob or TokenLogprob(_LOWEST)
            top = [entry(token, logprob) for token, logprob in found.top]
            content.append({**entry(out.token, found.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}


class CompletionFormat:
    kind, chunk_kind = "text_completion", "text_completion"

    def text_field(self) -> tuple[bytes, bytes]:
        return b'"text":', b""

    def opening(self, index: int) -> bytes:
        return b""

    def message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, entries: Sequence[tuple[TokenOut, int]], spell: Callable[[int], bytes]) -> dict[str, Any]:
        def name(token: int) -> str:
            """Tokens that are no whole characters are spelt as OpenAI spells them, so that names differ."""
            data = spell(token)
            try:
                return data.decode()
            except UnicodeDecodeError:
                return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

        found = [(out.token, out.logprob or TokenLogprob(_LOWEST)) for out, _ in entries]
        return {
            "tokens": [name(token) for token, _ in found],
            "token_logprobs": [max(logprob.logprob, _LOWEST) for _, logprob in found],
            "top_logprobs": [
                {name(other): max(value, _LOWEST) for other, value in ((token, logprob.logprob), *logprob.top)}
                for token, logprob in found
            ],
            "text_offset": [offset for _, offset in entries],
        }


class EventWriter:
    """Writes the events of one choice: one for each token, and one that says how it ended."""

    def __init__(self, form: Format, envelope: Envelope, index: int) -> None:
        self._form = form
        self._spell = envelope.spell
        self._token_ids = envelope.token_ids
        self._offset = 0
        before, self._after_text = form.text_field()
        self._start = _event_start(form, envelope)
        self._end = b"]" + (b',"usage":null' if envelope.include_usage else b"") + b"}\n\n"
        self._head = self._start + b'{"index":%d,' % index + before
        self._tail = self._after_text + b',"logprobs":null,"finish_reason":null}' + self._end
        self._index = index

    def opening(self) -> bytes:
        opening = self._form.opening(self._index)
        return self._start + opening + self._end if opening else b""

    def tokens(self, shown: Shown) -> bytes:
        """One event a token."""
        head, tail = self._head, self._tail
        return b"".join([head + encode(text) + tail for _, text in shown])

    def detailed_tokens(self, shown: Shown, *, with_logprobs: bool) -> bytes:
        """One event a token, with what was asked for beside the text."""
        events = []
        for out, text in shown:
            logprobs = encode(self._form.logprobs([(out, self._offset)], self._spell)) if with_logprobs else b"null"
            ids = b',"token_ids":[%d]' % out.token if self._token_ids else b""
            self._offset += len(text)
            events.append(
                self._head + encode(text) + self._after_text + ids + b',"logprobs":' + logprobs
                + b',"finish_reason":null}' + self._end
            )  # fmt: skip
        return b"".join(events)

    def finish(self, choice: Choice) -> bytes:
        reason = encode(choice.finish_reason)
        return (
            self._head + encode(choice.end) + self._after_text + b',"logprobs":null,"finish_reason":' + reason + b"}"
            + self._end
        )  # fmt: skip


def usage_event(form: Format, envelope: Envelope, usage: Usage, timeline: dict[str, float]) -> bytes:
    """The event before the last one: usage of all choices, and where the time went."""
    body = {"usage": usage_object(usage), "timeline": timeline}
    return _event_start(form, envelope) + b"]," + encode(body)[1:] + b"\n\n"


def error_event(error: dict[str, Any]) -> bytes:
    """Ends a stream that failed after its beginning; the openai client raises `APIError` on it."""
    return b"data: " + encode(error) + b"\n\n"


def whole_body(
    form: Format,
    envelope: Envelope,
    choices: Sequence[Choice],
    shown: Sequence[Shown],
    usage: Usage,
    *,
    with_logprobs: bool,
) -> bytes:
    """The body of an answer that was not streamed; `shown` holds each choice's tokens and text."""
    answers = []
    for choice, parts in zip(choices, shown, strict=True):
        entries, offset = [], 0
        for out, text in parts:
            entries.append((out, offset))
            offset += len(text)
        answers.append(
            {
                "index": choice.index,
                **form.message("".join(text for _, text in parts) + choice.end),
                **({"token_ids": [out.token for out, _ in parts]} if envelope.token_ids else {}),
                "logprobs": form.logprobs(entries, envelope.spell) if with_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
        )
    body = {"id": envelope.id, "object": form.kind, "created": envelope.created, "model": envelope.model}
    return encode({**body, "choices": answers, "usage": usage_object(usage)})


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _event_start(form: Format, envelope: Envelope) -> bytes:
    head = {"id": envelope.id, "object": form.chunk_kind, "created": envelope.created, "model": envelope.model}
    return b"data: " + encode(head)[:-1] + b',"choices":['
