"""A checkpoint's files on disk: safetensors, one file or several.

They are read in large pieces, into memory of ours and from there to the device. Not through a mapping, which is what
the format's own library offers: the kernel would bring in a few pages whenever one is touched for the first time, which
on a disk that is fast takes several times as long as reading.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open

from ..common.errors import InvalidRequest
from .shard import Axis

PIECE = 8 << 20
"""Bytes of one read: many enough for a disk, few enough to be in a cache still when they are copied to their place."""

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor is: from byte `begin` of its file on."""

    path: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class Checkpoint:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json lists, by name. Threads may
    read at the same time, each through a buffer of its own. Raises `InvalidRequest` where a file is missing or broken.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.tensors = stored(folder)
        self._device = device
        self._files = {path: path.open("rb", buffering=0) for path in {each.path for each in self.tensors.values()}}
        self._buffers = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def read(self, name: str, axes: Sequence[Axis], into: torch.Tensor) -> None:
        """Read the part of a tensor that `axes` name into a tensor of that shape on the device, of any type."""
        tensor = self.tensors[name]
        rows, *others = (slice(axis.part.start, axis.part.stop) for axis in axes)
        width = tensor.size // tensor.shape[0] * tensor.dtype.itemsize
        buffer = self._buffer(width)
        step = len(buffer) // width
        for first in range(rows.start, rows.stop, step):
            count = min(step, rows.stop - first)
            here = buffer[: count * width]
            self._fill(here, tensor.path, tensor.begin + first * width)
            there = here.view(tensor.dtype).view(count, *tensor.shape[1:]).to(self._device)
            into[first - rows.start :][:count].copy_(there[:, *others])

    def _buffer(self, least: int) -> torch.Tensor:
        """This thread's own; a GPU fetches from it by itself."""
        buffer: torch.Tensor | None = getattr(self._buffers, "bytes", None)
        if buffer is None or len(buffer) < least:
            buffer = torch.empty(max(PIECE, least), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self._buffers.bytes = buffer
        return buffer

    def _fill(self, buffer: torch.Tensor, path: Path, begin: int) -> None:
        view, done = buffer.numpy().data, 0
        try:
            while done < len(view):
                count = os.preadv(self._files[path].fileno(), [view[done:]], begin + done)
                if count == 0:
                    raise InvalidRequest(f"{path} has become shorter", param="model")
                done += count
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be read: {error}", param="model") from error


def stored(folder: Path) -> dict[str, Stored]:
    """See `Checkpoint`."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        shards = _shards_of(index)
    elif single.exists():
        shards = {single}
    else:
        raise InvalidRequest(f"{folder} has neither {single.name} nor {index.name}", param="model")
    found: dict[str, Stored] = {}
    for path in sorted(shards):
        try:
            found |= _tensors_of(path)
        except (OSError, SafetensorError) as error:
            raise InvalidRequest(f"{path} cannot be read: {error}", param="model") from error
    return found


def _shards_of(index: Path) -> set[Path]:
    """The files that an index names."""
    try:
        return {index.parent / file for file in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{index} is no index of shards: {error!r}", param="model") from error


def _tensors_of(path: Path) -> dict[str, Stored]:
    """Those of one file: eight bytes that say how long the header is, the header in JSON, then the numbers."""
    with safe_open(path, framework="pt"):
        ...  # it checks all of the header: that tensors lie one after the other, and that they fill the file
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in _TYPES:
            raise InvalidRequest(f"{path}: {name} is of type {entry['dtype']}, not {', '.join(_TYPES)}", param="model")
        begin = 8 + length + entry["data_offsets"][0]
        found[name] = Stored(path, begin, tuple(entry["shape"]), _TYPES[entry["dtype"]])
    return found


def weights_digest(folder: Path) -> str:
    """Cheap name of a checkpoint's content: config.json whole, and of each safetensors file the header, the size
    and bytes sampled at even distances. Tells checkpoints apart; does not prove that no byte was changed."""
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for path in sorted({each.path for each in stored(folder).values()}):
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(size.to_bytes(8, "little") + file.read(header))
            for i in range(_SAMPLES):
                file.seek(8 + header + max(0, size - 8 - header - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
