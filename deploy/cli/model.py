"""`baton model import`: a GGUF file becomes a checkpoint folder, in a process of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from ...common.child import EXIT_CONFIG
from ...common.errors import BatonError, InvalidRequest
from .. import models
from ..cluster import usable_cores
from ..display import Display, make_display
from ..launch.launcher import LocalLauncher, Spec
from ..models import ImportJob

IMPORT_TIMEOUT_S = 3600.0


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
    models.import_model(found.gguf, target, dtype, converter(make_display()))
    print(target)


def converter(display: Display) -> models.Convert:
    """What runs an `ImportJob` in a process of its own, which may load torch."""
    return lambda job: asyncio.run(_convert(job, display))


async def _convert(job: ImportJob, display: Display) -> None:
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
