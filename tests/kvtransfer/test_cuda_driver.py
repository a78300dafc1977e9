"""What is asked of CUDA's driver, and what is made of its answers, over a library that only writes down. The real one
is tried in `tests/gpu/test_kvtransfer.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from baton.common.errors import TransportFailed
from baton.kvtransfer import cuda_driver
from baton.kvtransfer.cuda_driver import HANDLE_BYTES, CudaDriver

POINTER, SIZE, DEVICE = 0x7F00_0000_0000, 1 << 20, 3
PUSHED = ("cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2")
POPPED = ("cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2")


class Library:
    """Succeeds, but for `fails`. `called`: names, in order."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.fails = ""

    def __getattr__(self, name: str) -> Callable[..., int]:
        def function(*arguments: Any) -> int:
            self.called.append(name)
            if name == self.fails:
                return 2
            match name:
                case "cuMemAlloc_v2" | "cuIpcOpenMemHandle_v2":
                    arguments[0]._obj.value = POINTER
                case "cuMemGetAddressRange_v2":
                    arguments[1]._obj.value = SIZE
                case "cuPointerGetAttribute":
                    arguments[0]._obj.value = DEVICE
                case "cuIpcGetMemHandle":
                    ctypes.memset(arguments[0]._obj.reserved, 0, HANDLE_BYTES)
                    arguments[0]._obj.reserved[0] = arguments[0]._obj.reserved[HANDLE_BYTES - 1] = 7
                case "cuGetErrorName":
                    arguments[1]._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"
            return 0

        return function


class Tensor:
    """Memory at `POINTER`."""

    def __init__(self, raw: Any, device: str) -> None:
        described = raw.__cuda_array_interface__
        assert described["data"] == (POINTER, False) and described["typestr"] == "|u1"
        (self.size,), self.device, self.zeroed = described["shape"], device, False

    def data_ptr(self) -> int:
        return POINTER

    def zero_(self) -> Tensor:
        self.zeroed = True
        return self


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch, "as_tensor", Tensor)
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name: library)
    return library


def calls(library: Library) -> list[str]:
    """What was called but for the context, which must have been there, and be gone."""
    count = library.called.count
    assert count(PUSHED[0]) == count(POPPED[1]) and count(PUSHED[1]) == count(POPPED[0]) > 0
    assert library.called[-1] in (POPPED[1], "cuGetErrorName")
    return [name for name in library.called if name not in (*PUSHED, *POPPED, "cuDeviceGet")]


def test_memory_is_allocated_zeroed_and_exported(library: Library) -> None:
    driver = CudaDriver(torch.device("cuda", 1))
    memory: Any = driver.allocate(SIZE)
    assert (memory.size, memory.device, memory.zeroed) == (SIZE, f"cuda:{DEVICE}", True)
    handle = driver.export(memory)
    assert len(handle) == HANDLE_BYTES and (handle[0], handle[1], handle[-1]) == (7, 0, 7)
    assert calls(library) == ["cuMemAlloc_v2", "cuPointerGetAttribute", "cuIpcGetMemHandle"]


def test_what_is_opened_is_all_of_it_and_on_its_own_device(library: Library) -> None:
    driver = CudaDriver(torch.device("cuda", 1))
    memory: Any = driver.open(bytes(HANDLE_BYTES))
    assert (memory.size, memory.device, memory.zeroed) == (SIZE, f"cuda:{DEVICE}", False)
    driver.close(memory)
    assert calls(library)[0] == "cuIpcOpenMemHandle_v2" and calls(library)[-1] == "cuIpcCloseMemHandle"


@pytest.mark.parametrize("function", ["cuDevicePrimaryCtxRetain", "cuMemAlloc_v2", "cuPointerGetAttribute"])
def test_what_fails_is_named_and_leaves_no_context(library: Library, function: str) -> None:
    library.fails = function
    driver = CudaDriver(torch.device("cuda", 1))
    with pytest.raises(TransportFailed, match=rf"{function}: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        driver.allocate(SIZE)
    count = library.called.count
    assert count(PUSHED[1]) == count(POPPED[0])
    assert count(PUSHED[0]) - (function == PUSHED[0]) == count(POPPED[1])


def test_no_driver_is_a_transport_that_fails(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Library:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", absent)
    with pytest.raises(TransportFailed, match="no CUDA driver"):
        CudaDriver(torch.device("cuda", 1))
