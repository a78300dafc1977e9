"""The routes of the OpenAI-compatible API."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from ..common.errors import BatonError, UnknownModel
from .door import Door, error_response
from .errors import BodyTimeout, BodyTooLarge, HttpError
from .schemas import Body, ChatBody, CompletionBody, DetokenizeBody, StrictBody, TokenizeBody, parse
from .service import Caller, Service

_BODY_TIMEOUT_S = 30.0
_SCHEMAS = "#/components/schemas/{model}"


def build(service: Service) -> ASGIApp:
    """The whole HTTP application around a service."""
    app = FastAPI(title="Baton", version=version("baton"), description="OpenAI-compatible API of a Baton cluster.")
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_models(app, service)
    _add_state(app, service)
    app.add_exception_handler(BatonError, _on_baton_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    _describe_bodies(app)
    return Door(app, service.config.api_keys, lambda: service.draining)


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatBody), tags=["text"])
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation; with `stream`, as server-sent events, one for each token."""
        with service.metrics.refusals():
            return await service.chat(await _read(request, service, ChatBody), _caller(request))

    @app.post("/v1/completions", openapi_extra=_takes(CompletionBody), tags=["text"])
    async def completions(request: Request) -> Response:
        """Continue one or several prompts."""
        with service.metrics.refusals():
            return await service.complete(await _read(request, service, CompletionBody), _caller(request))


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", openapi_extra=_takes(TokenizeBody), tags=["tokens"])
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt, or of a conversation under the model's chat template."""
        return JSONResponse(await service.tokenize(await _read(request, service, TokenizeBody)))

    @app.post("/detokenize", openapi_extra=_takes(DetokenizeBody), tags=["tokens"])
    async def detokenize(request: Request) -> Response:
        """Text of token ids, special tokens included."""
        return JSONResponse(await service.detokenize(await _read(request, service, DetokenizeBody)))


def _add_models(app: FastAPI, service: Service) -> None:
    model = service.model
    card = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "baton",
        "max_model_len": model.max_model_len,
    }

    @app.get("/v1/models", tags=["models"])
    async def list_models() -> dict[str, Any]:
        """The one model that this server has."""
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}", tags=["models"])
    async def retrieve_model(name: str) -> dict[str, Any]:
        if name != model.name:
            raise UnknownModel(f"the model {name!r} does not exist; this server has {model.name!r}", param="model")
        return card


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["state"])
    async def health() -> dict[str, str]:
        """The process is alive; whether it can serve is /ready's to say."""
        return {"status": "ok"}

    @app.get("/ready", tags=["state"])
    async def ready() -> Response:
        """200 when requests can be served, else 503; `state` is loading, ready, draining or unhealthy."""
        state, reason = service.ready()
        return JSONResponse({"state": state, "reason": reason}, 200 if state == "ready" else 503)

    @app.get("/metrics", tags=["state"])
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", tags=["state"])
    async def show_version() -> dict[str, str]:
        return {"version": version("baton")}


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


async def _read(request: Request, service: Service, kind: type[Body]) -> Body:
    """The body, bounded in size and time, parsed and checked: FastAPI's own reading is bounded in neither, and lets
    NaN and lone surrogates through."""
    limit = service.config.max_body_bytes
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise BodyTooLarge(f"the body is larger than {limit} bytes")
    except ClientDisconnect:
        raise BodyTimeout("the client left before its body was complete") from None
    except TimeoutError:
        raise BodyTimeout(f"the body was not there after {_BODY_TIMEOUT_S:.0f} s") from None
    return parse(kind, bytes(data))


async def _on_baton_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, BatonError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, as routing reports them."""
    assert isinstance(error, HTTPException)
    return error_response(HttpError(error.status_code, error.headers))


async def _on_bug(request: Request, error: Exception) -> Response:
    """What nobody foresaw. The server logs it with its traceback; the client learns no details."""
    return error_response(BatonError("internal error"))


def _takes(kind: type[StrictBody]) -> dict[str, Any]:
    schema = {"$ref": _SCHEMAS.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe_bodies(app: FastAPI) -> None:
    """Put the bodies' schemas into the OpenAPI page: the routes read them themselves, so FastAPI does not know them."""
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)],
        ref_template=_SCHEMAS,
    )
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        page = generate()
        page.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return page

    app.openapi = openapi  # type: ignore[method-assign]
