"""Two Ray nodes on this machine, in a network namespace where there is nothing but loopback: Ray opens its ports on
the machine's own address, and here that is 127.0.0.1."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
DASHBOARD = "http://127.0.0.1:8265"
START_TIMEOUT_S = 90.0

_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1
_OWN_NET = "/proc/thread-self/ns/net"


def eventually(true: Callable[[], object], what: str, timeout_s: float = 10.0) -> None:
    """Wait until `true()`; fail with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def ended(process: psutil.Process) -> bool:
    """Gone, or a zombie, which has ended as well."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Loopback:
    """A network namespace with nothing but loopback. Raises `OSError` for those who may not make one."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._home = os.open(_OWN_NET, os.O_RDONLY)
        self._check(self._libc.unshare(_CLONE_NEWNET))
        try:
            self._there = os.open(_OWN_NET, os.O_RDONLY)
            with socket.socket() as any_socket:
                fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", _IFF_UP))
        finally:
            self._check(self._libc.setns(self._home, _CLONE_NEWNET))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is in it, and what it starts: processes and threads."""
        self._check(self._libc.setns(self._there, _CLONE_NEWNET))
        try:
            yield
        finally:
            self._check(self._libc.setns(self._home, _CLONE_NEWNET))

    def close(self) -> None:
        os.close(self._there)
        os.close(self._home)

    def _check(self, result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def environment(folder: Path) -> dict[str, str]:
    """Of the nodes, and of the commands about what runs there: another cluster on this machine is not in the way."""
    own = {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0", "BATON_RUN_DIR": str(folder)}
    return os.environ | own


@dataclass
class Node:
    """One `ray start`, in the foreground: all processes of the node descend from it."""

    process: psutil.Popen
    seen: set[psutil.Process] = field(default_factory=set)

    @classmethod
    def start(cls, name: str, logs: Path, *flags: str) -> Node:
        """A node with 8 CPUs and 8 of a resource of its own name."""
        resources = json.dumps({name: 8})
        shape = ("--num-cpus", "8", "--resources", resources, "--object-store-memory", str(100 << 20))
        command = [str(BIN / "ray"), "start", "--block", "--node-name", name, *shape, "--disable-usage-stats", *flags]
        env = environment(logs) | {"PYTHONPATH": str(ROOT / "src")}
        with (logs / f"{name}.log").open("ab") as file:
            process = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env, cwd="/")
        return cls(process)

    def look(self) -> None:
        """Remember its processes."""
        if not ended(self.process):
            self.seen.update(self.process.children(recursive=True))

    def crash(self) -> None:
        """Its raylet dies by SIGKILL, and nothing else."""
        self.look()
        next(process for process in self.seen if process.name() == "raylet").kill()

    def end(self) -> None:
        """No process of it is left."""
        self.look()
        for process in (self.process, *self.seen):
            if not ended(process):
                process.kill()
        self.process.wait(10)
        eventually(lambda: all(map(ended, self.seen)), "the node's processes are gone")


class Nodes:
    """`first`, the head, and `second`, which may be crashed: `whole` starts it again."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._temp = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: it becomes part of names of sockets
        head = ("--head", "--port", "6379", "--dashboard-port", "8265", "--temp-dir", self._temp)
        self.first = Node.start("first", logs, *head)
        self.second: Node | None = None

    def whole(self) -> None:
        """Both nodes live, and Ray takes jobs."""
        eventually(lambda: _answers(self.first), f"Ray's head\n{self._log('first')}", START_TIMEOUT_S)
        if self.second is not None and ended(self.second.process):
            self.second.end()
            self.second = None
        if self.second is None:
            flags = ("--address", "127.0.0.1:6379", "--temp-dir", f"{self._temp}/2")
            self.second = Node.start("second", self.logs, *flags)
        eventually(lambda: len(alive()) == 2, f"two nodes\n{self._log('second')}", START_TIMEOUT_S)

    def end(self) -> None:
        for node in (self.second, self.first):
            if node is not None:
                node.end()
        shutil.rmtree(self._temp, ignore_errors=True)

    def _log(self, name: str) -> str:
        path = self.logs / f"{name}.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""


def _answers(head: Node) -> bool:
    assert not ended(head.process), "Ray's head ended"
    try:
        return httpx.get(f"{DASHBOARD}/api/version", timeout=5).status_code == 200 and bool(alive())
    except httpx.HTTPError:
        return False


def alive() -> list[str]:
    """Names of the nodes that Ray takes for living."""
    rows = _state("nodes")
    return [row["node_name"] for row in rows if row["state"] == "ALIVE"]


def groups() -> list[str]:
    """Names of the placement groups that are held or asked for."""
    return [row["name"] for row in _state("placement_groups") if row["state"] != "REMOVED"]


def actors() -> list[str]:
    """Classes of the actors that live."""
    return [row["class_name"] for row in _state("actors") if row["state"] != "DEAD"]


def _state(what: str) -> list[dict[str, str]]:
    answer = httpx.get(f"{DASHBOARD}/api/v0/{what}", params={"limit": 1000}, timeout=10).raise_for_status().json()
    return answer["data"]["result"]["result"]
