"""`baton serve`: flags and file become one configuration, and the cluster runs until it is told to end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..settings import Setting, from_environment, from_yaml, resolve
from .model import converter


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
    kv_memory: Annotated[
        str | None,
        typer.Option(
            help="KV pool of each worker (of each rank), held from the start: 512MiB, 2GiB.",
            show_default="1 GiB, on a GPU what is free",
        ),
    ] = None,
    device_memory: Annotated[
        float | None,
        typer.Option(help="Share of its GPU's memory that a worker may use: 0.48 for two on one.", show_default="1.0"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.", show_default="auto")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda.", show_default="auto")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of all workers.", show_default="all cores")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens that one step computes at most.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Sequences that decode together at most.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens of one KV block.", show_default="16")] = None,
    tp: Annotated[int | None, typer.Option(help="Ranks that share each worker's model.", show_default="1")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="The same bits in any batch and on any worker, but slower.")
    ] = None,
    dummy_weights: Annotated[bool | None, typer.Option("--dummy-weights", help="Random weights, for timing.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Folder for one log file a process.")] = None,
    launcher: Annotated[
        str | None,
        typer.Option(help="local: on this machine; ray: workers on a Ray cluster.", show_default="local"),
    ] = None,
    gateways: Annotated[int | None, typer.Option(help="HTTP doors, which share the port.", show_default="1")] = None,
    name: Annotated[str | None, typer.Option(help="Of this cluster, for --cluster.", show_default="default")] = None,
    admin_port: Annotated[int | None, typer.Option(help="Port of the operators' API.", show_default="any")] = None,
    autoscale: Annotated[bool | None, typer.Option("--autoscale", help="Keep to the SLOs by turns and sizes.")] = None,
) -> None:
    """Start controller, gateways and workers and serve until Ctrl-C.

    Flags go before variables (BATON_PORT, BATON_ENGINE__KV_MEMORY), and these before the file.

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
        "engine.device_memory": device_memory,
        "engine.dtype": dtype,
        "engine.device": device,
        "threads": threads,
        "engine.max_batch_tokens": max_batch_tokens,
        "engine.max_running": max_running,
        "engine.block_size": block_size,
        "engine.tp": tp,
        "engine.deterministic": deterministic,
        "engine.dummy_weights": dummy_weights,
        "log_dir": str(log_dir) if log_dir else None,
        "launcher": launcher,
        "gateways": gateways,
        "name": name,
        "admin_port": admin_port,
        "autoscale.enabled": autoscale,
    }
    settings = [*(from_yaml(config) if config else []), *from_environment(os.environ)]
    settings += [Setting(path, value, _flag(path)) for path, value in flags.items() if value is not None]
    from ..launch.parent import serve as run  # with gRPC, which no other command needs

    run(resolve(settings), converter)


def _flag(path: str) -> str:
    special = {"model": "MODEL", "api_keys": "--api-key", "autoscale.enabled": "--autoscale"}
    return special.get(path, "--" + path.rpartition(".")[2].replace("_", "-"))
