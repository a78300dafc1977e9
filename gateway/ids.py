"""The names of a request: its `x-request-id`, under which the router and the logs know it, and the id in the answer's
body, which is made from it, so that either finds it again."""

from __future__ import annotations

import re
import uuid

_GIVEN = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
_OWN = "req-"
_ANSWERS = ("chatcmpl", "cmpl")
"""How the ids of answers begin, as at OpenAI."""


def request_id(given: str) -> str:
    """The client's own id, if that is short and plain; else a new one."""
    return given if _GIVEN.fullmatch(given) else _OWN + uuid.uuid4().hex


def answer_id(kind: str, request: str) -> str:
    """The id of an answer; `kind` is `chatcmpl` or `cmpl`. As unique as the client's ids are, where it gives any."""
    return f"{kind}-{request.removeprefix(_OWN)}"


def choice_id(request: str, index: int, choices: int) -> str:
    """The id of one of the choices of a request, each of which is a request to the router."""
    return f"{request}-{index}" if choices > 1 else request


def meant_by(name: str) -> tuple[str, ...]:
    """All ids in the router that someone may mean who says `name`, the likeliest first: a request's id, that of its
    answer, or either with the number of a choice; without a number the first choice is meant. Empty: empty."""
    if not name:
        return ("",)
    kind, _, rest = name.partition("-")
    names = (name, _OWN + rest, rest) if kind in _ANSWERS else (name,)
    return tuple(choice for each in names for choice in (each, choice_id(each, 0, 2)))
