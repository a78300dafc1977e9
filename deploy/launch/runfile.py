"""How commands find the cluster that runs on this machine: a file that its parent writes, for this user's eyes only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...common.errors import BatonError, InvalidRequest
from ...common.json_form import from_json, to_json


@dataclass(frozen=True, slots=True)
class RunFile:
    """Where the admin API of a cluster is, and what to send. `pid`: of its parent."""

    name: str
    pid: int
    admin: str
    token: str


def run_dir() -> Path:
    """$BATON_RUN_DIR, else `baton` in $XDG_RUNTIME_DIR, else a folder in the cache."""
    if chosen := os.environ.get("BATON_RUN_DIR"):
        return Path(chosen).expanduser()
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "baton"
    return Path.home() / ".cache" / "baton" / "run"


def read(name: str) -> RunFile | None:
    """Of the cluster of this name; None: there is none, or its file cannot be read."""
    try:
        return from_json(_path(name).read_bytes(), RunFile)
    except (OSError, InvalidRequest):
        return None


class Claim:
    """The right to run a cluster under a name on this machine. It ends with the process, however that happens."""

    def __init__(self, name: str) -> None:
        """Raises `BatonError` if a cluster of this name runs, or the folder cannot be had."""
        self._path = _path(name)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock: IO[bytes] = self._path.with_suffix(".lock").open("wb")
        except OSError as error:
            raise BatonError(f"cannot write to {self._path.parent}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            other = read(name)
            who = f" (process {other.pid})" if other is not None else ""
            raise BatonError(f"a cluster named {name!r} runs already{who}: give this one another --name") from error

    def publish(self, run: RunFile) -> None:
        """Let commands find the cluster. Raises `BatonError`."""
        try:
            _write_private(self._path, to_json(run))
        except OSError as error:
            raise BatonError(f"cannot write {self._path}: {error.strerror}") from error

    def release(self) -> None:
        """The cluster has ended."""
        self._path.unlink(missing_ok=True)
        self._lock.close()


def _path(name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise InvalidRequest(f"{name!r} is not a name for a cluster: use letters, digits, '-', '_' and '.'")
    return run_dir() / f"{name}.json"


def _write_private(file: Path, data: bytes) -> None:
    """All of it or nothing, for this user's eyes only. Raises `OSError`."""
    draft = file.with_suffix(".draft")
    with contextlib.suppress(FileNotFoundError):
        draft.unlink()
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(data)
    draft.replace(file)
