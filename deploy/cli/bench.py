"""`baton bench`: the way to `bench/cli.py`."""

from __future__ import annotations

import importlib

import typer

from ...common.errors import BatonError


def bench(context: typer.Context) -> None:
    """Everything after `bench` belongs to bench/cli.py, which is loaded only now: it may need more packages."""
    try:
        command = importlib.import_module("baton.bench.cli").app
    except ModuleNotFoundError as error:
        raise BatonError(f"baton bench needs {error.name}; install it with: pip install 'baton[bench]'") from error
    raise typer.Exit(command(context.args, prog_name="baton bench", standalone_mode=False) or 0)
