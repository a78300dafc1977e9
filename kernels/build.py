"""C sources compiled where they run: once, with the system's C compiler, for this processor, into the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_COMPILE_TIMEOUT_S = 120.0


def load(source: Path, *flags: str) -> ctypes.CDLL:
    """The library of one C source, from the cache or compiled now.

    `flags` are for the compiler and not for the linker: what they leave open must be found in this process, so that
    a source may use a runtime (OpenMP's) that another library has brought along. Raises `OSError` where there is no
    compiler, where it fails or takes too long, and where the library cannot be loaded.
    """
    return ctypes.CDLL(str(_compiled(source, flags)))


def _compiled(source: Path, extra: tuple[str, ...]) -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise OSError("there is no C compiler")
    tune = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    flags = ["-O3", tune, "-std=gnu11", "-fPIC", *extra]
    version = _call([compiler, "--version"])
    key = hashlib.blake2b(
        "\n".join((source.read_text(), compiler, version, _processor(), *flags)).encode(), digest_size=12
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "kernels"
    target = cache / f"{source.stem}-{key.hexdigest()}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            item, built = Path(scratch) / "item.o", Path(scratch) / "built.so"
            _call([compiler, *flags, "-c", str(source), "-o", str(item)])
            _call([compiler, "-shared", str(item), "-o", str(built), "-lm"])
            built.replace(target)
    return target


def _call(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{' '.join(command)} took longer than {_COMPILE_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()[:500]}")
    return done.stdout


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
