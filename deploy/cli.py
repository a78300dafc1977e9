"""The command `baton`. It reads, checks and hands over; nothing here computes, and torch is never imported.

Exit codes: 0 done or drained in order, 1 failed while running, 2 wrong arguments, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import setproctitle
import typer

from .. import __version__
from ..common.child import EXIT_CONFIG
from ..common.errors import BatonError, InvalidRequest
from . import models
from .cluster import gateway_config, usable_cores, worker_configs
from .control.controller import Controller, claim_port
from .display import Display, make_display
from .launch.launcher import LocalLauncher, LogFiles, Spec
from .models import ImportJob
from .settings import ServeConfig, Setting, from_yaml, resolve

IMPORT_TIMEOUT_S = 3600.0

app = typer.Typer(
    name="baton",
    help="Serve large language models with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(help="Prepare models.", no_args_is_help=True)
app.add_typer(model_app, name="model")


def main() -> None:
    """Console script. Every error is one line."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of `baton ARGUMENTS`."""
    try:
        return app(arguments, prog_name="baton", standalone_mode=False) or 0
    except typer.TyperException as error:
        return _complain(error.format_message(), 2)
    except InvalidRequest as error:
        return _complain(error.message, 2)
    except BatonError as error:
        return _complain(error.message, 1)
    except (KeyboardInterrupt, typer.Abort):
        return 130


def _complain(message: str, code: int) -> int:
    if message:  # empty: a command without arguments, which has shown its help
        print(f"baton: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"baton {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    del version  # handled by its callback


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, GGUF file, or 'demo'.", show_default="demo")
    ] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers.", show_default="1")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers.", show_default="1")] = None,
    colocated: Annotated[int | None, typer.Option(help="Workers that do both; replaces the default pair.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0: any free one.", show_default="8000")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file; flags override it.")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key that clients must send; repeatable.", envvar="BATON_API_KEY")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="Name that clients use.", show_default="from MODEL")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and output together at most.")] = None,
    kv_memory: Annotated[str | None, typer.Option(help="KV pool of each worker (of each rank): 512MiB, 2GiB.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.", show_default="auto")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda.", show_default="auto")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of all workers.", show_default="all cores")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens that one step computes at most.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Sequences that decode together at most.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens of one KV block.", show_default="16")] = None,
    tp: Annotated[int | None, typer.Option(help="Ranks that share each worker's model.", show_default="1")] = None,
    dummy_weights: Annotated[bool | None, typer.Option("--dummy-weights", help="Random weights, for timing.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Folder for one log file a process.")] = None,
) -> None:
    """Start controller, workers and gateway on this machine and serve until Ctrl-C.

    Example: baton serve demo --prefill 1 --decode 2 --port 8123
    """
    flags = {
        "model": model,
        "prefill": prefill,
        "decode": decode,
        "colocated": colocated,
        "host": host,
        "port": port,
        "api_keys": api_key or None,
        "model_name": model_name,
        "engine.max_model_len": max_model_len,
        "engine.kv_memory": kv_memory,
        "engine.dtype": dtype,
        "engine.device": device,
        "threads": threads,
        "engine.max_batch_tokens": max_batch_tokens,
        "engine.max_running": max_running,
        "engine.block_size": block_size,
        "engine.tp": tp,
        "engine.dummy_weights": dummy_weights,
        "log_dir": str(log_dir) if log_dir else None,
    }
    settings = from_yaml(config) if config else []
    settings += [Setting(path, value, _flag(path)) for path, value in flags.items() if value is not None]
    _serve(resolve(settings))


def _flag(path: str) -> str:
    name = path.rpartition(".")[2].removesuffix("s" if path == "api_keys" else "")
    return "MODEL" if path == "model" else "--" + name.replace("_", "-")


def _serve(config: ServeConfig) -> None:
    source = models.find(config.model)
    endpoint = claim_port(config.host, config.port)
    setproctitle.setproctitle("baton serve")  # `ps` shows what it is, and no longer a key among its arguments
    display = make_display()
    launcher = LocalLauncher(log=_log_files(config.log_dir) if config.log_dir else display.log)
    folder = models.prepare(source, lambda job: asyncio.run(_convert(job, display)))
    name = config.model_name or source.name
    gateway = replace(gateway_config(config, folder, name), port=endpoint.port)
    token = os.environ.get("BATON_CLUSTER_TOKEN", "")  # for operators who talk to the workers themselves
    asyncio.run(Controller(worker_configs(config, folder, name), gateway, launcher, display, token=token).run())


def _log_files(log_dir: str) -> LogFiles:
    folder = Path(log_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"--log-dir: cannot make {folder}: {error.strerror}") from error
    return LogFiles(folder)


@model_app.command("import")
def import_model(
    source: Annotated[str, typer.Argument(help="GGUF file, or 'demo'.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Folder to make; without it: the cache of `baton serve`.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 (keeps each value exactly), bfloat16, float16.")] = "float32",
) -> None:
    """Turn a GGUF file into a checkpoint folder: config.json, safetensors, tokenizer and chat template.

    Example: baton model import demo ./smollm2
    """
    found = models.find(source)
    if found.gguf is None:
        raise InvalidRequest(f"SOURCE: {source} is a checkpoint folder already")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InvalidRequest(f"--dtype: {dtype!r} is not one of float32, bfloat16, float16")
    if folder is None and dtype != "float32":
        raise InvalidRequest("--dtype: the cache holds float32; give a DIR for another")
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidRequest(f"DIR: {folder} exists and is not an empty folder")
    target = folder or models.cached_folder(found.gguf)
    display = make_display()
    models.import_model(found.gguf, target, dtype, lambda job: asyncio.run(_convert(job, display)))
    print(target)


async def _convert(job: ImportJob, display: Display) -> None:
    """Run the job in a process of its own: it needs torch."""
    display.note(f"converting {Path(job.source).name}; this happens once")
    lines: list[str] = []
    process = await LocalLauncher(log=lambda _, line: lines.append(line)).start(Spec("import", job, usable_cores()))
    try:
        async with asyncio.timeout(IMPORT_TIMEOUT_S):
            code = await process.wait()
    except TimeoutError as error:
        raise BatonError(f"converting {job.source} took longer than {IMPORT_TIMEOUT_S:.0f} s") from error
    finally:
        process.kill()
    if code:
        why = lines[-1].rpartition(" error ")[2] if lines else f"exit code {code}"  # without time and name
        raise (InvalidRequest if code == EXIT_CONFIG else BatonError)(f"cannot convert {job.source}: {why}")


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    short_help="Measure a server: latency, throughput, goodput.",
)
def bench(context: typer.Context) -> None:
    """Everything after `bench` belongs to bench/cli.py, which is loaded only now: it may need more packages."""
    try:
        command = importlib.import_module("baton.bench.cli").app
    except ModuleNotFoundError as error:
        raise BatonError(f"baton bench needs {error.name}; install it with: pip install 'baton[bench]'") from error
    raise typer.Exit(command(context.args, prog_name="baton bench", standalone_mode=False) or 0)
