"""Errors as OpenAI's clients expect them: {"error": {message, type, param, code}} under the right status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from ..common.errors import BatonError


class BodyTooLarge(BatonError):
    code, http_status = "request_too_large", 413


class BodyTimeout(BatonError):
    """The client began to send a body and did not go on."""

    code, http_status = "request_timeout", 408


class HttpError(BatonError):
    """What routing refuses (404, 405); `code` is the status's name."""

    def __init__(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(HTTPStatus(status).phrase)
        self.http_status = status
        self.code = HTTPStatus(status).phrase.lower().replace(" ", "_")
        self.headers = dict(headers or {})


_RETRY_STATUSES = (429, 503)


def error_body(error: BatonError) -> dict[str, Any]:
    kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    if error.http_status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_headers(error: BatonError) -> dict[str, str]:
    """Retry-After where another try can help, and how to authenticate where a key is missing."""
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if error.http_status in _RETRY_STATUSES:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1.0)))
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers
