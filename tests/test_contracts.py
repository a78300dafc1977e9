"""The table of rooms, where import-linter cannot see: what kernels import, what a running process has loaded, and a
few words that must appear nowhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    *("bench", "common", "decode", "deploy", "engine", "gateway", "kernels"),
    *("kvtransfer", "prefill", "protos", "router", "worker"),
)
USERS_OF_KERNELS = {"kernels", "engine", "kvtransfer", "deploy", "bench"}


def sources(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


@cache
def imports(path: Path) -> list[str]:
    """Absolute names of all modules that a file imports, at its top or within functions."""
    package, names = ["baton", *path.relative_to(ROOT).parent.parts], []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            names += [name, *(f"{name}.{alias.name}" for alias in node.names)]
    return names


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "baton" and len(parts) > 1 and parts[1] in ROOMS else None


def loaded_by(*modules: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter that has imported `modules`."""
    code = f"import sys, {', '.join(modules)}; print(' '.join({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_every_room_is_linked_into_the_package_and_no_other_folder_is() -> None:
    links = {path.name: path.resolve() for path in (ROOT / "src" / "baton").iterdir() if path.is_symlink()}
    assert links == {room: ROOT / room for room in ROOMS}


def test_kernels_import_nothing_of_ours() -> None:
    files = sources("kernels")
    assert files
    assert [(str(f), m) for f in files for m in imports(f) if room_of(m) not in (None, "kernels")] == []


def test_only_engine_and_kvtransfer_use_kernels() -> None:
    users = {path.relative_to(ROOT).parts[0] for path in sources(*ROOMS) if "kernels" in map(room_of, imports(path))}
    assert "engine" in users  # or this test sees nothing
    assert users <= USERS_OF_KERNELS


def test_kernels_has_no_init_so_that_no_other_package_takes_it_for_the_one_it_looks_for() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_gateway_process_loads_no_torch() -> None:
    loaded = loaded_by("baton.deploy.process", "baton.gateway.main")
    assert {"fastapi", "grpc"} <= loaded
    assert not loaded & {"torch", "transformers", "numba", "triton"}


def test_the_router_loads_neither_torch_nor_a_web_framework() -> None:
    modules = [f"baton.router.{path.stem}" for path in sources("router") if path.stem != "__init__"]
    assert modules
    assert not loaded_by(*modules) & {"torch", "numba", "fastapi", "starlette", "pydantic", "uvicorn"}


def test_the_worker_process_loads_no_web_framework() -> None:
    loaded = loaded_by("baton.deploy.process", "baton.worker.main")
    assert "grpc" in loaded
    assert not loaded & {"fastapi", "starlette", "pydantic", "uvicorn"}


def test_what_runs_on_a_gpu_needs_little_beside_torch() -> None:
    """The GPU check runs where only packages that are all Python can be added."""
    loaded = loaded_by("baton.worker.main", "baton.bench.engine.pair", "baton.bench.gpu_kvtransfer")
    assert "cattrs" in loaded
    assert not loaded & {"msgspec", "fastapi", "pydantic", "uvicorn", "ray", "typer", "httpx", "uvloop"}


@pytest.mark.parametrize("module", ["pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"])
def test_nothing_unpickles(module: str) -> None:
    assert [str(path) for path in sources(*ROOMS) if module in {m.partition(".")[0] for m in imports(path)}] == []


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    return [path for name in names if name and (path := ROOT / name.decode()).is_file() and not path.is_symlink()]


def test_no_tracked_file_knows_the_machine_it_was_written_on() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # Written apart, so that this file does not find itself. A machine's own folders, in text of any kind.
    folders = re.compile(
        rb"(?<![\w.~])/(?:" + b"|".join([b"work" + b"/", b"home" + b"/", b"Users" + b"/", b"root" + b"/"]) + rb")"
    )
    found = [str(path.relative_to(ROOT)) for path in tracked() if folders.search(path.read_bytes())]
    assert found == []
