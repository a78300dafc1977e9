"""Which transport two workers use. Pure: from where the two run and what each offers."""

from __future__ import annotations

from collections.abc import Collection

from ..common.config import TRANSPORTS
from ..common.errors import TransportFailed
from ..common.messages import Endpoint
from .layout import as_kept


def choose(source: Endpoint, target: Endpoint, wanted: str = "auto", avoid: Collection[str] = ()) -> str:
    """The best transport that both ends have, but for those in `avoid`; `wanted`, if it is one of them. Raises
    `TransportFailed` where none is left."""
    possible = [name for name in TRANSPORTS if name not in avoid and _possible(name, source, target)]
    if wanted in possible:
        return wanted
    automatic = [name for name in possible if name != "process-group" or _has_nccl(source, target)]
    if automatic:
        return automatic[0]
    raise TransportFailed(f"no transport is left between {source.ref.name} and {target.ref.name}")


def _possible(name: str, source: Endpoint, target: Endpoint) -> bool:
    if name in ("cuda-ipc", "shm") and not (source.host == target.host and as_kept(source.format, target.format)):
        return False  # the target fetches rows as the source keeps them, on the machine that both are on
    if name == "process-group" and len({door.get(name) for end in (source, target) for door in end.doors}) > 1:
        return False  # NCCL and gloo do not meet
    return all(name in door for end in (source, target) for door in end.doors)


def _has_nccl(source: Endpoint, target: Endpoint) -> bool:
    """gloo is slower than plain sockets: it is for those who ask for it."""
    return all(door["process-group"].startswith("nccl") for end in (source, target) for door in end.doors)
