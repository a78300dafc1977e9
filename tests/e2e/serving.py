"""`baton serve` as a real process: started with given flags, watched, and ended with nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from baton.common.json_form import from_json
from baton.deploy.launch.runfile import RunFile

COMMAND = str(Path(sys.executable).parent / "baton")
MARK = "Baton serves at "
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


def eventually(true: Callable[[], object], what: str, timeout_s: float = 10.0) -> None:
    """Wait until `true()`; fail with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def title(process: psutil.Process) -> str:
    """What `ps` shows for it; empty if it is gone."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def run_dir(log: Path) -> Path:
    """Of the `baton serve` with this log: each has its own, so that all of them may have the same name."""
    return log.with_suffix(".run")


def gone(process: psutil.Process) -> bool:
    """Ended; a zombie has ended as well, and only its parent has not looked yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass
class Serve:
    """One running `baton serve`. Its output and its children's logs are in the file `log`."""

    log: Path
    process: subprocess.Popen[bytes]
    url: str = ""
    seen: set[psutil.Process] = field(default_factory=set)

    @classmethod
    def start(cls, log: Path, *flags: str, env: dict[str, str] | None = None) -> Serve:
        """Returns at once; `wait_ready` waits."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                [COMMAND, "serve", "--port", "0", *flags],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in os.environ.items() if k != "BATON_API_KEY"}
                | {"BATON_RUN_DIR": str(run_dir(log))}
                | (env or {}),
            )
        return cls(log, process)

    @property
    def run_file(self) -> RunFile:
        """Where its operators reach it."""
        return from_json((run_dir(self.log) / "default.json").read_bytes(), RunFile)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> Serve:
        """Until it has said where it serves, and /ready agrees."""
        eventually(lambda: MARK in self.output or self.process.poll() is not None, f"ready\n{self.output}", timeout_s)
        assert MARK in self.output, f"baton serve ended with {self.process.returncode}\n{self.output}"
        self.url = self.output.partition(MARK)[2].split()[0]
        self.children()
        assert httpx.get(f"{self.url}/ready", timeout=10).status_code == 200
        return self

    def children(self) -> dict[str, psutil.Process]:
        """Its processes by name: `controller`, `gateway-0`, `prefill-0`, `decode-0`, …"""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.seen.update(found)
        return {name: p for p in found if (name := title(p).removeprefix("baton ")) and name != title(p)}

    def signal(self, number: signal.Signals) -> None:
        """Send it to `baton serve` itself."""
        self.children()
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Its exit code, after making sure that none of its processes is left."""
        code = self.process.wait(timeout_s)
        eventually(lambda: all(map(gone, self.seen)), f"its processes are gone: {[*map(title, self.seen)]}")
        return code

    def stop(self) -> int:
        """SIGTERM, and what `wait` says. Fine on one that has ended already."""
        self.signal(signal.SIGTERM)
        try:
            return self.wait()
        finally:
            for process in (p for p in self.seen if not gone(p)):
                process.kill()
            self.process.kill()
