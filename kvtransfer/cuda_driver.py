"""The few calls of CUDA's driver that torch has no door to: device memory that other processes can open."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..common.errors import TransportFailed

HANDLE_BYTES = 64

_LAZY_PEER_ACCESS = 1
_DEVICE_ORDINAL = 9  # a CUpointer_attribute


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


@dataclass(frozen=True, slots=True)
class _Raw:
    """Memory at an address, as torch takes it without a copy."""

    pointer: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.pointer, False), "version": 2}


class CudaDriver:
    """For one device, in the context that torch uses. All methods may be called on any thread, and raise
    `TransportFailed` where the driver does not do it."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        self._index = torch.cuda.current_device() if device.index is None else device.index
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise TransportFailed(f"no CUDA driver: {error}") from error

    def allocate(self, size: int) -> torch.Tensor:
        """Zeroed bytes in an allocation of their own: handles are of whole allocations, and torch's allocator carves
        its tensors out of larger ones. Never freed."""
        pointer = ctypes.c_uint64()
        with self._context():
            self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return self._tensor(pointer.value, size).zero_()

    def export(self, memory: torch.Tensor) -> bytes:
        """A handle by which other processes of this machine can open an allocation."""
        handle = _Handle()
        with self._context():
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(memory.data_ptr()))
        return bytes(handle)

    def open(self, handle: bytes) -> torch.Tensor:
        """What another process has exported: the whole allocation, on this device or on one that this can reach."""
        pointer = ctypes.c_uint64()
        with self._context():
            passed = _Handle.from_buffer_copy(handle)
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), passed, ctypes.c_uint(_LAZY_PEER_ACCESS))
            base, size = ctypes.c_uint64(), ctypes.c_size_t()
            self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), pointer)
        return self._tensor(pointer.value, size.value)

    def close(self, memory: torch.Tensor) -> None:
        """The other end of `open`: nothing reads it any more."""
        with self._context():
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(memory.data_ptr()))

    def _tensor(self, pointer: int, size: int) -> torch.Tensor:
        """On the device that the driver says: torch would copy to any other."""
        ordinal = ctypes.c_int()
        with self._context():
            self._call("cuPointerGetAttribute", ctypes.byref(ordinal), _DEVICE_ORDINAL, ctypes.c_uint64(pointer))
        memory: torch.Tensor = torch.as_tensor(_Raw(pointer, size), device=f"cuda:{ordinal.value}")
        if memory.data_ptr() != pointer:
            raise TransportFailed("torch does not take the memory as it is")
        return memory

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        """Threads of ours have none until torch does something on them."""
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), self._index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            self._call("cuCtxPushCurrent_v2", context)
            try:
                yield
            finally:
                self._call("cuCtxPopCurrent_v2", ctypes.byref(context))
        finally:
            self._call("cuDevicePrimaryCtxRelease_v2", device)

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(name))
            raise TransportFailed(f"{function}: {(name.value or b'unknown').decode()} ({status})")
