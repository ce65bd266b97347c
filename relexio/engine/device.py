"""NumPy or CuPy: where the arrays of a task live."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from relexio.dtypes import Array
from relexio.errors import DeviceError

DEVICES = ("auto", "cpu", "cuda")
_thread = threading.local()


def resolve(device: str) -> str:
    """``cpu`` or ``cuda``; for ``auto``, ``cuda`` if it is available.

    Raises DeviceError if ``cuda`` is requested and CuPy or a GPU is missing.
    """
    if device == "cpu":
        return "cpu"
    problem = _cuda_problem()
    if problem and device == "cuda":
        raise DeviceError(
            f"--device cuda: {problem}; use --device cpu, or install relexio[gpu] on a machine with a GPU"
        )
    return "cpu" if problem else "cuda"


def _cuda_problem() -> str:
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no GPU can be used ({error})"
    return ""


def own_stream(device: str) -> None:
    """Give the calling thread a stream of its own, once: its copies and kernels run beside those of other threads.

    CuPy keeps the current stream, and the cuBLAS handle, a thread; what is freed goes to the stream that had it.
    """
    if device != "cuda":
        return
    import cupy

    if getattr(_thread, "stream_of", None) is not cupy:
        cupy.cuda.Stream(non_blocking=True).use()
        _thread.stream_of = cupy


@contextmanager
def limited(device: str, limit: int) -> Iterator[None]:
    """Hold the device's memory pool under ``limit`` bytes while inside; enter and leave with no worker running.

    The limit is one for all streams. Each stream keeps what it freed, but CuPy gives all that back to the device
    before it says out of memory. So a worker never does: in CuPy 13 that can lock up with another that allocates.
    """
    if device != "cuda":
        yield
        return
    import cupy

    pool = cupy.get_default_memory_pool()
    before = pool.get_limit()
    pool.set_limit(size=limit)
    try:
        yield
    finally:
        pool.free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()
        pool.set_limit(size=before)


def device_limit(wanted: int | None) -> int:
    """Bytes of device memory to stay under: ``wanted``, or four fifths of what is free, and never more than that."""
    import cupy

    free = int(cupy.cuda.runtime.memGetInfo()[0] * 0.8)  # the rest is for the context, cuBLAS, and other programs
    return min(wanted or free, free)


def failures() -> tuple[type[BaseException], ...]:
    """The exceptions by which a device and its libraries say that they failed; none where CuPy was not imported."""
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return ()
    runtime, driver, cublas = cupy.cuda.runtime, cupy.cuda.driver, cupy.cuda.cublas
    found = runtime.CUDARuntimeError, driver.CUDADriverError, cublas.CUBLASError
    return cupy.cuda.memory.OutOfMemoryError, *found


def out_of_memory(error: BaseException) -> bool:
    """Whether one of these is about memory: an array, or what a library needs for itself, did not fit."""
    return isinstance(error, MemoryError) or any(
        text in str(error).lower() for text in ("out of memory", "alloc_failed")
    )


def to_device(array: np.ndarray, device: str) -> Array:
    """The array on the device; itself on the CPU.

    CuPy copies it to pinned memory, which it keeps until the stream is past the copy, and goes on without waiting.
    """
    return _library(device).asarray(array)


def zeros(shape: tuple[int, ...], device: str) -> Array:
    """Float64 zeros on the device."""
    return _library(device).zeros(shape)


def _library(device: str) -> Any:
    return import_module("cupy") if device == "cuda" else np


def to_host(array: Array) -> np.ndarray:
    """The array as NumPy's, when all that the thread's stream has to do for it is done."""
    return array if isinstance(array, np.ndarray) else array.get()
