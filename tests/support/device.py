"""CuPy as far as the package uses it, on NumPy, and stricter: what CuPy refuses, lacks or leaves undefined is an error here.

Read off CuPy's sources (13.6), and its names and signatures (14.2; test_device.py compares them where CuPy is there). Kernels
are compiled by the C compiler of this machine, and run.

- An array of NumPy is never taken for one of the device, in an operation or a kernel, nor the other way.
- A kernel takes arrays in one piece of memory, and integers of a stated size. What is not written has no value.
- An array belongs to the stream of the thread that made it; another thread would have to wait for it.
- Only the thread that runs no kernels may empty the memory pool.
"""

import ctypes
import shutil
import subprocess
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from relexio.engine.device import limited

_LETTERS = "?bBhHiIlLqQefd"
_UNWRITTEN = 0xA5
_OPTIONS = ("-x", "c", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC")


class OutOfMemoryError(MemoryError):
    pass


class DriverError(RuntimeError):
    pass


class LibraryError(RuntimeError):
    pass


class Memory:
    """One allocation of the pool, given back when the last array that uses it is gone."""

    def __init__(self, pool: "Pool", size: int) -> None:
        self.pool, self.size = pool, 0
        pool.take(size)
        self.size = size

    def __del__(self) -> None:
        self.pool.take(-self.size)


class Pool:
    """Bytes in use and their peak, under a limit, and ``room`` that other programs have left.

    ``kept`` is the peak since free blocks were last given back: what is in use or kept for later.
    """

    def __init__(self, room: int) -> None:
        self.room, self.used, self.kept, self.peak, self.refused = room, 0, 0, 0, 0
        self.limits = [0]
        self._lock = threading.RLock()

    def take(self, size: int) -> None:
        with self._lock:
            if size > 0 and self.used + size > min(self.room, self.limits[-1] or self.room):
                self.refused += 1
                raise OutOfMemoryError
            self.used += size
            self.kept, self.peak = max(self.kept, self.used), max(self.peak, self.used)

    def used_bytes(self) -> int:
        return self.used

    def total_bytes(self) -> int:
        return self.kept

    def get_limit(self) -> int:
        return self.limits[-1]

    def set_limit(self, size: int) -> None:
        self.limits.append(size)

    def free_all_blocks(self) -> None:
        assert threading.current_thread() is threading.main_thread(), "can lock up with an allocation in CuPy 13"
        self.kept = self.used


class DeviceArray:
    """An array that is not NumPy's: it can do what the package needs, and nothing happens to it unseen."""

    def __init__(self, cupy: "StandIn", values: np.ndarray, memory: Memory | None = None) -> None:
        assert values.dtype.char in _LETTERS and values.dtype.isnative, f"CuPy has no {values.dtype}"
        self._cupy, self._stream = cupy, cupy.stream()
        self._memory = memory or Memory(cupy.pool, -(-values.nbytes // 512) * 512)
        self._values = values if memory else values.copy()

    @property
    def held(self) -> np.ndarray:
        """The elements, for this thread."""
        if self._stream is not self._cupy.stream():
            raise RuntimeError("an array of one stream is used on another without waiting")
        return self._values

    shape = property(lambda self: self.held.shape)
    dtype = property(lambda self: self.held.dtype)
    size = property(lambda self: self.held.size)
    T = property(lambda self: self._seen(self.held.T))

    def _new(self, values: Any) -> "DeviceArray":
        return DeviceArray(self._cupy, np.asarray(values))

    def _seen(self, values: np.ndarray) -> "DeviceArray":
        return DeviceArray(self._cupy, values, self._memory)

    def __len__(self) -> int:
        return len(self.held)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("one kernel for each element")

    def get(self, out: np.ndarray | None = None) -> np.ndarray:
        if out is None:
            return self.held.copy()
        out[:] = self.held
        return out

    def set(self, values: np.ndarray) -> None:
        assert isinstance(values, np.ndarray) and values.dtype == self.dtype and values.shape == self.shape
        self.held[:] = values

    def copy(self) -> "DeviceArray":
        return self._new(self.held)

    def sum(self) -> "DeviceArray":
        return self._new(self.held.sum())

    def __matmul__(self, other: Any) -> "DeviceArray":
        operands = [operand.held for operand in (self, _array(other))]
        assert all(operand.dtype == np.float64 and operand.ndim == 2 for operand in operands)
        with np.errstate(all="ignore"):
            return self._new(np.matmul(*operands))

    def __iadd__(self, other: Any) -> "DeviceArray":
        with np.errstate(all="ignore"):
            np.add(self.held, _array(other).held, out=self.held, casting="no")
        return self

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        return NotImplemented


def _array(value: Any) -> DeviceArray:
    if not isinstance(value, DeviceArray):
        raise TypeError(f"Unsupported type {type(value)}")
    return value


@cache
def _compiled(code: str, options: tuple[str, ...]) -> ctypes.CDLL:
    """A module's kernels, as functions of C."""
    if not (compiler := shutil.which("cc")):
        pytest.skip("needs a C compiler")
    with tempfile.TemporaryDirectory() as scratch:
        source, library = Path(scratch, "kernels.cu"), Path(scratch, "kernels.so")
        source.write_text(code)
        definitions = [option for option in options if option.startswith("-D")]
        subprocess.run([compiler, *_OPTIONS, *definitions, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


class RawModule:
    """Kernels, one call of which does what all threads of a grid do."""

    def __init__(self, code: str, options: tuple[str, ...]) -> None:
        assert "-fmad=false" in options, "products would not be rounded before they are added"
        self._library = _compiled(code, options)

    def get_function(self, name: str) -> Callable[[tuple[int], tuple[int], tuple[Any, ...]], None]:
        function = getattr(self._library, name)
        function.restype = None

        def kernel(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
            assert 0 < grid[0] < 1 << 31 and 0 < block[0] <= 1024
            function(*(_argument(argument) for argument in arguments))

        return kernel


def _argument(value: Any) -> Any:
    if type(value) is np.int64:
        return ctypes.c_longlong(int(value))
    assert _array(value).held.flags.c_contiguous, "a kernel knows no strides"
    return ctypes.c_void_p(value.held.ctypes.data)


class Stream:
    """Where a thread's work goes once it has said ``use``."""

    def __init__(self, cupy: "StandIn", non_blocking: bool = False) -> None:
        assert non_blocking, "would wait for the default stream"
        self._cupy = cupy

    def use(self) -> None:
        self._cupy.current.stream = self
        self._cupy.streams.append(self)

    def synchronize(self) -> None:
        """Nothing is under way: NumPy has done it all."""

    def __enter__(self) -> "Stream":
        self._before = getattr(self._cupy.current, "stream", None)
        self._cupy.current.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        self._cupy.current.stream = self._before


class StandIn(types.ModuleType):
    """The module: a device with ``room`` bytes left for the pool, though it says it has ``free``."""

    __version__ = "of the stand-in"
    RawModule = RawModule

    def __init__(self, room: int = 1 << 40, free: int = 1 << 40) -> None:
        super().__init__("cupy")
        self.pool, self.current = Pool(room), threading.local()
        self.streams: list[Stream] = []
        self._free = free
        runtime = types.SimpleNamespace(
            getDeviceCount=lambda: 1, memGetInfo=lambda: (self._free, free), CUDARuntimeError=RuntimeError,
            malloc=self._malloc, free=lambda size: self._take(-size),
            getDeviceProperties=lambda _: {"name": b"no GPU but NumPy in its place"},
            driverGetVersion=lambda: 0, runtimeGetVersion=lambda: 0,
        )  # fmt: skip
        self.cuda = types.SimpleNamespace(
            memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            runtime=runtime,
            driver=types.SimpleNamespace(CUDADriverError=DriverError),
            cublas=types.SimpleNamespace(CUBLASError=LibraryError),
            Stream=lambda non_blocking=False: Stream(self, non_blocking),
            get_current_stream=self.stream,
            alloc_pinned_memory=bytearray,
        )

    def _malloc(self, size: int) -> int:
        """Memory outside the pool, its size in place of an address: less is left, and less is said to be free."""
        if size > min(self._free, self.pool.room - self.pool.used):
            raise RuntimeError("cudaErrorMemoryAllocation: out of memory")
        self._take(size)
        return size

    def _take(self, size: int) -> None:
        self.pool.room -= size
        self._free -= size

    def stream(self) -> Stream:
        stream = getattr(self.current, "stream", None)
        assert stream is not None, "work on the default stream, which all threads share"
        return stream

    def get_default_memory_pool(self) -> Pool:
        return self.pool

    def get_default_pinned_memory_pool(self) -> Any:
        return types.SimpleNamespace(free_all_blocks=self.pool.free_all_blocks)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any = float) -> DeviceArray:
        return DeviceArray(self, np.zeros(shape, dtype))

    def empty(self, shape: int | tuple[int, ...], dtype: Any = float) -> DeviceArray:
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[:] = _UNWRITTEN
        return DeviceArray(self, array)

    def cumsum(self, values: DeviceArray) -> DeviceArray:
        return DeviceArray(self, np.cumsum(_array(values).held))

    def asarray(self, values: np.ndarray) -> DeviceArray:
        assert isinstance(values, np.ndarray)
        return DeviceArray(self, values)


@contextmanager
def taken(cupy: Any, left: int) -> Iterator[None]:
    """Another allocation has all of a device's memory but about ``left`` bytes while inside. For CuPy and the stand-in."""
    runtime, pointers = cupy.cuda.runtime, []
    size = runtime.memGetInfo()[0] - left
    try:
        while size >= 1 << 20:  # what is free is not always in one piece
            try:
                pointers.append(runtime.malloc(size))
            except runtime.CUDARuntimeError:
                size //= 2
            else:
                size = min(size, runtime.memGetInfo()[0] - left)
        yield
    finally:
        for pointer in pointers:
            runtime.free(pointer)


@contextmanager
def taken_late(cupy: Any, left: int) -> Iterator[None]:
    """The same, while passes run and only then: they are planned as if there were more."""

    @contextmanager
    def with_less(device: str, limit: int) -> Iterator[None]:
        with taken(cupy, left) if device == "cuda" else nullcontext(), limited(device, limit):
            yield

    with mock.patch("relexio.engine.executor.limited", with_less):
        yield
