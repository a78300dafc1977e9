"""How long a checkpoint takes to load, against the time in which the same files can be read at all:
`python -m baton.bench.engine.loading`, or `baton bench loading`.

The files are written first, with a model's shapes and numbers that mean nothing. Before each reading they are thrown
out of the page cache, so that both come from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ...common.errors import BatonError
from ...engine.model_config import ModelConfig
from ...engine.shard import shard
from ...engine.weights import READERS, Part, assemble, load_weights
from ...kernels.reference import TorchOps
from ..record import write

CONFIGS = Path(__file__).parent.parent / "configs"
PIECE = 8 << 20
"""Bytes of one read in the plain reading."""
NOISE = 256 << 20
"""Bytes of random numbers, from which every tensor is cut: a disk that compresses gains nothing by a file of zeros."""


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of each, one after the other: `read_s` into one small buffer, `keep_s` into as much new memory as there
    are bytes, `load_s` as weights."""

    read_s: float
    keep_s: float
    load_s: float


def make(config: Path, folder: Path, shards: int) -> int:
    """A checkpoint in bfloat16 of the model that `config` describes. Returns its bytes."""
    shutil.copy(config / "config.json", folder)
    sizes = tensors(ModelConfig.load(config))
    whole = sum(_bytes(size) for size in sizes.values())
    random = np.random.default_rng(0)
    noise = torch.from_numpy(random.integers(0, 256, min(NOISE, 2 * whole), np.uint8))
    parts: list[dict[str, torch.Size]] = [{} for _ in range(shards)]
    done = 0
    for name, size in sizes.items():
        parts[done * shards // whole][name] = size
        done += _bytes(size)
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    for name, part in zip(names, parts, strict=True):
        save_file({each: _cut(noise, size, random) for each, size in part.items()}, folder / name)
    index = {each: name for name, part in zip(names, parts, strict=True) for each in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return whole


def tensors(config: ModelConfig) -> dict[str, torch.Size]:
    """The names and sizes of all tensors, as the loader asks for them."""
    found: dict[str, torch.Size] = {}

    def source(parts: list[Part]) -> torch.Tensor:
        found.update((part.name, torch.Size(axis.size for axis in part.axes)) for part in parts)
        return torch.cat([torch.empty(found[part.name], dtype=torch.bfloat16, device="meta") for part in parts])

    assemble(shard(config), source, TorchOps(), 1)
    return found


def _bytes(size: torch.Size) -> int:
    return size.numel() * torch.bfloat16.itemsize


def _cut(noise: torch.Tensor, size: torch.Size, random: np.random.Generator) -> torch.Tensor:
    """So much of it, from anywhere, and from its front again where it ends."""
    count, start = _bytes(size), int(random.integers(0, len(noise) // 2)) * 2
    turns = -(-(start + count) // len(noise))
    return torch.cat([noise] * turns)[start : start + count].clone().view(torch.bfloat16).view(size)


def forget(files: Sequence[Path]) -> None:
    """Have the page cache forget them."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: Sequence[Path], readers: int, keep: bool) -> None:
    """All of them, by so many threads, each of which reads every so-manieth piece. `keep` all of it until the end."""
    kept = {path: np.empty(path.stat().st_size if keep else 0, np.uint8) for path in files}

    def pieces(first: int) -> None:
        buffer = np.empty(PIECE, np.uint8)
        for path in files:
            with path.open("rb", buffering=0) as file:
                for begin in range(first * PIECE, path.stat().st_size, readers * PIECE):
                    into = kept[path][begin : begin + PIECE] if keep else buffer
                    os.preadv(file.fileno(), [into.data], begin)

    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(pieces, range(readers)))


def measure(folder: Path, device: str, rounds: int) -> Iterator[Round]:
    """By turns, each from files that the page cache has forgotten. Raises `BatonError`."""
    files = sorted(folder.glob("*.safetensors"))
    config = ModelConfig.load(folder)
    for _ in range(rounds):
        forget(files)
        with timed() as reading:
            read(files, READERS, keep=False)
        forget(files)
        with timed() as keeping:
            read(files, READERS, keep=True)
        forget(files)
        with timed() as loading:
            weights = load_weights(
                folder, shard(config), TorchOps(), torch.bfloat16, torch.device(device), lambda share: None
            )
            if device != "cpu":
                torch.cuda.synchronize(device)
        del weights
        yield Round(reading(), keeping(), loading())


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yields what returns the seconds that the block took, once it has ended."""
    begin, end = time.perf_counter(), 0.0
    try:
        yield lambda: end - begin
    finally:
        end = time.perf_counter()


def main(arguments: list[str] | None = None) -> int:
    """0 where all was measured."""
    parser = argparse.ArgumentParser(prog="baton bench loading", description="Loading, against reading the same files.")
    parser.add_argument("--model", type=Path, default=CONFIGS / "llama-3.1-8b", help="folder with a config.json")
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to be read; default: that of temporary files"
    )
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file; default: bench/results")
    options = parser.parse_args(arguments)
    found: list[Round] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        try:
            size = make(options.model, Path(made), options.shards)
            for one in measure(Path(made), options.device, options.rounds):
                found.append(one)
                print(
                    f"{size / 1e9:.1f} GB in {options.shards} files: read in {one.read_s:.2f} s, into new memory in "
                    f"{one.keep_s:.2f} s, loaded to {options.device} in {one.load_s:.2f} s, "
                    f"{one.load_s / one.read_s:.2f} and {one.load_s / one.keep_s:.2f} times as long",
                    flush=True,
                )
        except BatonError as error:
            print(f"baton bench loading: {error.message}", file=sys.stderr)
            return 1
    parameters = {"model": options.model.name, "shards": options.shards, "device": options.device, "bytes": size}
    write("loading", "loading", [asdict(one) for one in found], parameters, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
