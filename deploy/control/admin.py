"""The operators' HTTP API of the controller. Its token is its own, apart from the clients' API keys; probes and metrics
need none."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException

from ...common.cluster import LogQuestion
from ...common.errors import BatonError, InvalidRequest, Unauthorized
from ...common.json_form import to_json
from .controller import Controller
from .metrics import Numbers

B = TypeVar("B", bound="_Body")

MAX_BODY = 1 << 20


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ScaleBody(_Body):
    pools: dict[str, int]


class DrainBody(_Body):
    worker: str
    now: bool = False


class RolloutBody(_Body):
    model: str | None = None
    set: dict[str, Any] = {}


def build(controller: Controller, token: str) -> FastAPI:
    """The app. All of `/v1` wants `token`; errors are those of `common/errors.py`, as JSON."""
    app = FastAPI(openapi_url=None)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Numbers(controller))

    @app.exception_handler(BatonError)
    async def on_error(_: Request, error: BatonError) -> Response:
        return _error(error, error.http_status)

    @app.exception_handler(HTTPException)  # no such path, or another method
    async def on_wrong_path(request: Request, error: HTTPException) -> Response:
        return _error(InvalidRequest(f"{request.method} {request.url.path}: {error.detail}"), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def on_wrong_query(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _error(InvalidRequest(f"{first['loc'][-1]}: {first['msg']}", param=str(first["loc"][-1])), 400)

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        state = controller.readiness()
        return _json({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    operators = [Depends(_guard(token))]

    @app.get("/v1/status", dependencies=operators)
    async def status() -> Response:
        return _json(controller.status())

    @app.post("/v1/scale", dependencies=operators)
    async def scale(request: Request) -> Response:
        body = await _body(request, ScaleBody)
        return _json({"steps": await controller.scale(body.pools)})

    @app.post("/v1/drain", dependencies=operators)
    async def drain(request: Request) -> Response:
        body = await _body(request, DrainBody)
        await controller.drain(body.worker, body.now)
        return _json({})

    @app.post("/v1/rollout", dependencies=operators)
    async def rollout(request: Request) -> Response:
        body = await _body(request, RolloutBody)
        await controller.rollout(body.model, body.set)
        return _json({"revision": controller.desired.revision})

    @app.post("/v1/down", dependencies=operators)
    async def down() -> Response:
        controller.down()
        return _json({})

    @app.get("/v1/trace/{request_id}", dependencies=operators)
    async def trace(request_id: str) -> Response:
        return _json(await controller.trace(request_id))

    @app.get("/v1/logs/{process}", dependencies=operators)
    async def logs(process: str, after: int = -100, limit: int = 1000) -> Response:
        return _json(await controller.logs(LogQuestion(process, after, limit)))

    return app


def _guard(token: str) -> Callable[[Request], None]:
    wanted = f"Bearer {token}".encode()

    def check(request: Request) -> None:
        if not hmac.compare_digest(request.headers.get("authorization", "").encode(), wanted):
            raise Unauthorized("the operators' token is missing or wrong: Authorization: Bearer …")

    return check


async def _body(request: Request, kind: type[B]) -> B:
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise InvalidRequest(f"the body is larger than {MAX_BODY} bytes")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidRequest(f"the body: {where}: {first['msg']}" if where else f"the body: {first['msg']}") from error


def _error(error: BatonError, status: int) -> Response:
    return _json({"error": {"code": error.code, "message": error.message, "param": error.param}}, status)


def _json(value: object, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")
