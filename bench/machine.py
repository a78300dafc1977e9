"""What a result was measured on: processor, memory and its bandwidth, commit, command. No host names, no paths."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ..common.errors import InvalidRequest


def provenance() -> dict[str, Any]:
    """Machine, commit, command and date of the process that calls."""
    return {
        "machine": machine(),
        "commit": commit(),
        "command": command(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine() -> dict[str, Any]:
    return {
        "cpu": _first(Path("/proc/cpuinfo"), r"model name\s*:\s*(.+)") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(_first(Path("/proc/meminfo"), r"MemTotal:\s*(\d+)") or 0) / 2**20, 1),
        "python": platform.python_version(),
    }


def commit() -> str:
    """Short hash of the checkout, "-dirty" where tracked files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, timeout=10)
        state = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        ).stdout
    except OSError:  # no git on this machine
        return "unknown"
    return head.stdout.strip() + ("-dirty" if state.strip() else "") if head.returncode == 0 else "unknown"


def command(argv: list[str]) -> str:
    """The command line as it could be typed elsewhere: paths shortened to their last part, hosts left out."""
    return shlex.join([Path(argv[0]).name, *(_anonymous(word) for word in argv[1:])])


def _anonymous(word: str) -> str:
    if "://" in word:
        port = urlsplit(word).port
        return f"http://HOST:{port}" if port else "http://HOST"
    return Path(word).name if "/" in word else word


def _first(path: Path, pattern: str) -> str:
    """First group of the first match in a file; empty where there is none."""
    found = re.search(pattern, path.read_text()) if path.exists() else None
    return found.group(1).strip() if found else ""


def busy() -> float:
    """Processes that wanted to run, over the last minute: what else this machine does. Take it before measuring."""
    return round(os.getloadavg()[0], 2)


def read_bandwidth(threads: int, megabytes: int = 512, rounds: int = 5) -> float:
    """Bytes a second that `threads` threads read from memory, the best of `rounds` passes over an array that no
    cache holds. Decoding one sequence reads every weight once a step, so this over the weights' bytes is the most
    tokens a second that batch 1 can reach."""
    data = np.ones((megabytes << 20) // 8, dtype=np.uint64)
    parts = np.array_split(data, threads)
    best = float("inf")
    for _ in range(rounds):
        workers = [threading.Thread(target=np.sum, args=(part,)) for part in parts]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - begin)
    return data.nbytes / best


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's tensors: what one decode step reads. Raises `InvalidRequest` where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidRequest(f"no safetensors in {folder}")
    return sum(file.stat().st_size for file in files)
