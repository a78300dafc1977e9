"""What `baton serve` shows: progress bars on a terminal, one line a fact elsewhere. Logs go to standard error, the
address to standard output."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from ..common.config import GatewayConfig
from .control.status import WorkerRow


class Display(Protocol):
    def log(self, name: str, line: str) -> None:
        """A line that the process `name` logged."""
        ...

    def note(self, text: str) -> None:
        """A fact about the whole."""
        ...

    def workers(self, rows: Sequence[WorkerRow]) -> None:
        """The state of the workers, while they start."""
        ...

    def ready(self, url: str, curl: str) -> None:
        """Everything runs: say where, and a first request."""
        ...

    def close(self) -> None:
        """No more progress is shown. Idempotent."""
        ...


def make_display() -> Display:
    console = Console(stderr=True)
    return BarDisplay(console) if console.is_terminal else LineDisplay()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a reader that has gone away is no reason to stop serving
        print(text, file=sys.stderr, flush=True)


class LineDisplay:
    """Plain lines, for a log file or another program."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[str, int]] = {}

    def log(self, name: str, line: str) -> None:
        del name  # each line of a process begins with its name already
        _say(line)

    def note(self, text: str) -> None:
        _say(f"baton: {text}")

    def workers(self, rows: Sequence[WorkerRow]) -> None:
        for worker in rows:
            percent = int(worker.progress * 4) * 25
            if self._shown.get(worker.name) != (worker.state, percent):
                self._shown[worker.name] = (worker.state, percent)
                self.note(f"{worker.name} {worker.state}" + (f" {percent} %" if worker.state == "loading" else ""))

    def ready(self, url: str, curl: str) -> None:
        print(f"\nBaton serves at {url}\n\n{curl}\n", flush=True)

    def close(self) -> None:
        """Nothing to undo."""


class BarDisplay:
    """One bar for each worker, above which log lines scroll."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )

    def log(self, name: str, line: str) -> None:
        del name
        self._console.out(line, highlight=False)

    def note(self, text: str) -> None:
        self._console.print(f"[dim]baton:[/] {escape(text)}", highlight=False, soft_wrap=True)

    def workers(self, rows: Sequence[WorkerRow]) -> None:
        self._progress.start()
        for worker in rows:
            if worker.name not in self._bars:
                self._bars[worker.name] = self._progress.add_task(worker.name, total=1.0, state="")
            done = 1.0 if worker.state == "ready" else worker.progress
            self._progress.update(self._bars[worker.name], completed=done, state=f"{worker.state} {worker.detail}")

    def ready(self, url: str, curl: str) -> None:
        self.close()
        print(f"\nBaton serves at {url}\n\n{curl}\n\nStop it with Ctrl-C.", flush=True)

    def close(self) -> None:
        self._progress.stop()


def curl_line(url: str, gateway: GatewayConfig) -> str:
    """A first request that works as it stands (with keys: once BATON_API_KEY is set in that shell)."""
    prompt: dict[str, Any]
    if has_chat_template(Path(gateway.model)):
        path, prompt = "chat/completions", {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    else:
        path, prompt = "completions", {"prompt": "The capital of France is"}
    body = json.dumps({"model": gateway.model_name, **prompt, "max_tokens": 32, "temperature": 0})
    body = body.replace("'", "'\\''")
    key = ' -H "Authorization: Bearer $BATON_API_KEY"' if gateway.api_keys else ""
    return f"curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{body}'"


def has_chat_template(model: Path) -> bool:
    """Whether the checkpoint folder says how a conversation becomes a prompt."""
    if (model / "chat_template.jinja").is_file():
        return True
    for name in ("chat_template.json", "tokenizer_config.json"):
        with contextlib.suppress(OSError, ValueError):
            if json.loads((model / name).read_text(encoding="utf-8")).get("chat_template"):
                return True
    return False
