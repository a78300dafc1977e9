"""The operator's end of the admin API: where a cluster is found, and one method for each thing that it can be asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import httpx
import typer

from ...common.cluster import LogLines, Trace
from ...common.errors import BatonError, InvalidRequest
from ...common.json_form import from_json
from ..control.status import ClusterStatus
from ..launch import runfile
from .exits import NoCluster, Refused

T = TypeVar("T")

TIMEOUT_S = 10.0
"""For an answer. Operations are answered when they are noted, not when they are done."""

ClusterName = Annotated[str | None, typer.Option("--cluster", help="Name of a cluster that runs on this machine.")]
AdminUrl = Annotated[
    str | None,
    typer.Option(
        "--admin", help="URL of its admin API; the token goes into BATON_ADMIN_TOKEN.", envvar="BATON_ADMIN_URL"
    ),
]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cluster is asked. `pid`: of its parent, where that is on this machine; else 0."""

    url: str
    token: str
    pid: int = 0

    @property
    def dead(self) -> bool:
        """Whether it is known to have ended."""
        return self.pid != 0 and not _lives(self.pid)


def find(cluster: str | None, admin: str | None) -> Place:
    """The cluster that is meant: by URL, by name, or the only one that runs on this machine. Raises `NoCluster`, and
    `InvalidRequest` where it would be a guess."""
    if cluster is None and admin is not None:
        return Place(admin.rstrip("/"), os.environ.get("BATON_ADMIN_TOKEN", ""))
    names = [cluster] if cluster else sorted(file.stem for file in runfile.run_dir().glob("*.json"))
    found = [run for run in map(runfile.read, names) if run is not None and _lives(run.pid)]
    if not found:
        what = f"cluster {cluster!r}" if cluster else "cluster"
        raise NoCluster(f"no {what} runs here (looked in {runfile.run_dir()}); for one elsewhere say --admin URL")
    if len(found) > 1:
        raise InvalidRequest(f"several clusters run here: {', '.join(run.name for run in found)}; say --cluster NAME")
    return Place(found[0].admin.rstrip("/"), found[0].token, found[0].pid)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, as another user's
        return True
    return True


class AdminClient:
    """Asks one cluster. Each method raises `NoCluster` if no answer comes within `TIMEOUT_S`, `Refused` with the
    cluster's own words if the answer is no, and `BatonError` if the cluster failed over it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._http = httpx.Client(
            base_url=place.url,
            headers={"Authorization": f"Bearer {place.token}"} if place.token else {},
            timeout=TIMEOUT_S,
            trust_env=False,
        )

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def status(self) -> ClusterStatus:
        """Everything at this moment."""
        return self._ask("GET", "/v1/status", ClusterStatus)

    def scale(self, pools: Mapping[str, int]) -> tuple[str, ...]:
        """Change the sizes of pools. Returns the steps, in words."""
        return self._ask("POST", "/v1/scale", _Steps, {"pools": dict(pools)}).steps

    def drain(self, worker: str, now: bool) -> None:
        """Let a worker go."""
        self._ask("POST", "/v1/drain", dict[str, Any], {"worker": worker, "now": now})

    def rollout(self, model: str | None, changes: Mapping[str, Any]) -> None:
        """Replace all workers, with other weights or other options."""
        self._ask("POST", "/v1/rollout", dict[str, Any], {"model": model, "set": dict(changes)})

    def down(self) -> None:
        """End the cluster, in order."""
        self._ask("POST", "/v1/down", dict[str, Any], {})

    def trace(self, request_id: str) -> Trace:
        """A recent request; `slowest`: the slowest of them."""
        return self._ask("GET", f"/v1/trace/{quote(request_id, safe='')}", Trace)

    def logs(self, process: str, after: int, limit: int) -> LogLines:
        """Lines of a process's log from number `after` on; a negative one: the last `-after`."""
        return self._ask("GET", f"/v1/logs/{quote(process, safe='')}?after={after}&limit={limit}", LogLines)

    def _ask(self, method: str, path: str, kind: type[T], body: object = None) -> T:
        try:
            answer = self._http.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            lives = self.place.pid and not self.place.dead
            more = "; the cluster runs, and starts a controller that died again: try in a moment" if lives else ""
            raise NoCluster(f"no answer from {self.place.url}: {error or type(error).__name__}{more}") from error
        if not answer.is_success:
            raise _refusal(answer)
        try:
            return from_json(answer.content, kind)
        except InvalidRequest as error:
            raise BatonError(f"{self.place.url} answers what this version of baton cannot read: {error}") from error


@dataclass(frozen=True, slots=True)
class _Steps:
    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Error:
    message: str


@dataclass(frozen=True, slots=True)
class _ErrorBody:
    error: _Error


def _refusal(answer: httpx.Response) -> BatonError:
    try:
        message = from_json(answer.content, _ErrorBody).error.message
    except InvalidRequest:
        return BatonError(f"{answer.url} answered {answer.status_code} {answer.reason_phrase}")
    return BatonError(message) if answer.status_code == 500 else Refused(message)
