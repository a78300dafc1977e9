"""What a client may ask: the bodies of the API, checked.

A parameter that is not known here is refused by name, because ignoring it could change the answer silently. The two
exceptions are parameters that change nothing in the output, and unsupported ones at the value that means "off".
"""

from __future__ import annotations

import secrets
from typing import Annotated, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)

from ..common.errors import InvalidRequest
from ..common.types import MAX_LOGPROBS, SamplingParams

MAX_MESSAGES = 4096
"""Messages of a conversation, and parts of a message: checking and rendering them holds up the event loop."""
MAX_CHOICES = 128
"""Outputs of one HTTP request at most: prompts × n."""
MAX_STOPS = 16
MAX_STOP_CHARS = 256

_HARMLESS = frozenset(
    ("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user")
)
_OFF: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Parameters of OpenAI's API that are not supported, with the values that ask for nothing."""

_TAG_MARK = "~"
"""Begins the tags of unions, which pydantic puts into an error's path and clients have no use for."""

StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Body = TypeVar("Body", bound="StrictBody")


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompt_kind(value: object) -> str | None:
    """Which of the four forms of a prompt is meant: the first item decides."""
    if isinstance(value, str):
        return "~text"
    kinds: dict[type, str] = {str: "~texts", int: "~tokens", list: "~token_lists"}
    return kinds.get(type(value[0])) if isinstance(value, list) and value else None


def _content_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "~text"
    return "~parts" if isinstance(value, list) else None


class StrictBody(BaseModel):
    """Strict: "0.5" is not a number and 1 is not true. NaN and the infinities are not numbers either."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    def refuse_unsupported(self, where: str = "") -> None:
        """Raise `InvalidRequest` naming the first parameter that would change the output and is not supported;
        `where` is the path of this object in the body."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _HARMLESS or value in _OFF.get(name, ()):
                continue
            what = "is not supported by this server" if name in _OFF else "is not known to this server"
            raise InvalidRequest(f"{where}{name} {what}", param=where + name)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description="Accepted and ignored.")


class SamplingBody(StrictBody):
    """The parameters that chat and plain completions share. `null` means the default everywhere, as at OpenAI."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = Field(None, description="Random if not given.")
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="Token id (as a string) to a bias of -100 to 100.")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="What fits the context, if not given.")
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop: Annotated[list[StopString], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)] | None = Field(
        None, description="A string or a list of strings; the text ends before the first that appears."
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    return_token_ids: bool | None = Field(
        None, description="Give each choice's tokens as `token_ids` as well: they are exact where text is not."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(StrictBody):
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[
            Annotated[str, Tag("~text")] | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES), Tag("~parts")],
            Discriminator(
                _content_kind,
                custom_error_type="content",
                custom_error_message="Input should be a string or a list of text parts",
            ),
        ]
        | None
    ) = None
    name: str | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates expect a message: text parts joined, the developer's word as the system's."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        return message


class ChatBody(SamplingBody):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="Goes before max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def alternatives(self) -> int | None:
        """How many alternatives to give beside each chosen token; None: no log-probabilities at all."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        return None


class CompletionBody(SamplingBody):
    prompt: Annotated[
        Annotated[str, Tag("~text")]
        | Annotated[list[str], Field(fail_fast=True), Tag("~texts")]
        | Annotated[TokenIds, Tag("~tokens")]
        | Annotated[list[TokenIds], Field(fail_fast=True), Tag("~token_lists")],
        Discriminator(
            _prompt_kind,
            custom_error_type="prompt",
            custom_error_message="Input should be a string, a list of strings, a list of token ids, "
            "or a list of lists of token ids, and not empty",
        ),
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TokenizeBody(StrictBody):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool = Field(True, description="Of a prompt; a chat template brings its own.")


class DetokenizeBody(StrictBody):
    model: str | None = None
    tokens: TokenIds


def for_template(messages: list[Message]) -> list[dict[str, str]]:
    """The conversation as a chat template takes it. Raises `InvalidRequest` for what a message may not hold."""
    for index, message in enumerate(messages):
        message.refuse_unsupported(f"messages.{index}.")
    return [message.for_template() for message in messages]


def parse(kind: type[Body], data: bytes) -> Body:
    """The checked body of a request. Raises `InvalidRequest` naming the parameter that is wrong."""
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(part for part in map(str, first["loc"]) if not part.startswith(_TAG_MARK))
        raise InvalidRequest(f"{param}: {first['msg']}" if param else first["msg"], param=param or None) from None
    body.refuse_unsupported()
    return body


_PASSED_ON = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
)


def sampling(body: SamplingBody, max_tokens: int, alternatives: int | None, vocab_size: int) -> SamplingParams:
    """Checked sampling parameters, with the seed resolved. Raises `InvalidRequest` naming the parameter."""
    given = {name: value for name in _PASSED_ON if (value := getattr(body, name)) is not None}
    params = SamplingParams(
        max_tokens=max_tokens,
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
        logit_bias=_biases(body.logit_bias or {}),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=alternatives,
        **given,
    )
    params.validate(vocab_size)
    return params


def _biases(by_name: dict[str, float]) -> tuple[tuple[int, float], ...]:
    if not all(name.isascii() and name.isdecimal() and len(name) < 10 for name in by_name):
        raise InvalidRequest("logit_bias must have token ids as its keys", param="logit_bias")
    return tuple((int(name), bias) for name, bias in by_name.items())
