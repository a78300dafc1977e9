"""ARCHITECTURE.md and README.md name only what exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from baton.deploy import models
from baton.deploy.settings import ServeConfig

ROOT = Path(__file__).parent.parent
PAGES = ["ARCHITECTURE.md", "README.md", "CONTRIBUTING.md", "bench/README.md"]


def quoted(page: str) -> set[str]:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    return set(re.findall(r"`([^`\n]+)`", text))


def sources() -> str:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.proto"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = [ROOT / name for name in listed.stdout.split()]
    return "\n".join(file.read_text() for file in files if file.is_file() and file != Path(__file__))


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    paths = {q for q in quoted(page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", q) and ("/" in q or q.endswith(".py"))}
    paths = {p for p in paths if "NAME" not in p}  # a placeholder
    missing = {p for p in paths if not (ROOT / p).exists() and not (ROOT / page).parent.joinpath(p).exists()}
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page: str) -> None:
    code = sources()
    names = {q for q in quoted(page) if re.fullmatch(r"([A-Z][a-z]+)+(\.\w+)?|\w+\(\)", q)}
    parts = {part.removesuffix("()") for name in names for part in name.split(".")}
    assert not {part for part in parts if not re.search(rf"\b{part}\b", code)}


def test_the_first_request_asks_for_the_model_that_is_served_where_it_is_served() -> None:
    readme, default = (ROOT / "README.md").read_text(), ServeConfig()
    asked = re.findall(r'"?model"?[:=] ?"([^"]+)"', readme)
    assert len(asked) == 2, "with curl and with the openai client"
    assert set(asked) == {models.find(default.model).name}
    assert set(re.findall(r"http://([\d.]+:\d+)/v1", readme)) == {f"{default.host}:{default.port}"}


def test_the_pages_are_worth_testing() -> None:
    assert len(quoted("ARCHITECTURE.md")) > 60
