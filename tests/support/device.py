"""CuPy as far as the package uses it, on NumPy, and stricter: what CuPy refuses, lacks or leaves undefined is an error here.

Read off CuPy's sources (13.6), and its names and signatures (14.2; test_device.py compares them where CuPy is there):

- An array of NumPy is never taken for one of the device, in an operation, an index or an assignment, nor the other way.
- A NumPy scalar has the type of the array beside it: how others are promoted depends on the version of CuPy.
- Assigning to a place twice at once is undefined. Single precision has no subnormal numbers (kernels are built so).
- An array belongs to the stream of the thread that made it; another thread would have to wait for it.
- Only the thread that runs no kernels may empty the memory pool.
"""

import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np

from relexio.engine.device import limited

UFUNCS = (
    "add", "subtract", "multiply", "matmul", "absolute", "isnan", "invert", "bitwise_and", "bitwise_or", "bitwise_xor",
    "left_shift", "right_shift", "equal", "not_equal", "greater",
)  # fmt: skip
FUNCTIONS = ("where", "zeros_like", "cumsum", "searchsorted")
OPERATORS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "matmul": "matmul", "and": "bitwise_and", "or": "bitwise_or",
    "xor": "bitwise_xor", "lshift": "left_shift", "rshift": "right_shift", "eq": "equal", "ne": "not_equal",
    "gt": "greater",
}  # fmt: skip
_LETTERS = "?bBhHiIlLqQefd"
_SMALLEST = np.finfo(np.float32).tiny


class OutOfMemoryError(MemoryError):
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
    ndim = property(lambda self: self.held.ndim)
    T = property(lambda self: self._seen(self.held.T))

    def _new(self, values: Any) -> "DeviceArray":
        return DeviceArray(self._cupy, np.asarray(values))

    def _seen(self, values: np.ndarray) -> "DeviceArray":
        return DeviceArray(self._cupy, values, self._memory)

    def __len__(self) -> int:
        return len(self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    def __int__(self) -> int:
        return int(self.held)

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

    def view(self, dtype: Any) -> "DeviceArray":
        assert np.dtype(dtype).itemsize == self.held.itemsize
        return self._seen(self.held.view(dtype))

    def reshape(self, *shape: int) -> "DeviceArray":
        assert self.held.flags.c_contiguous, "would be a copy"
        return self._seen(self.held.reshape(*shape))

    def astype(self, dtype: Any) -> "DeviceArray":
        with np.errstate(all="ignore"):
            return self._new(_flushed(_flushed(self.held).astype(dtype)))

    def any(self) -> "DeviceArray":
        return self._new(self.held.any())

    def sum(self) -> "DeviceArray":
        return self._new(self.held.sum())

    def _key(self, key: Any) -> Any:
        if isinstance(key, DeviceArray):
            assert key.dtype.kind in "iu", "indices are integers"
            return key.held
        if isinstance(key, int | slice):
            return key
        raise TypeError(f"{type(key).__name__} as an index")

    def __getitem__(self, key: Any) -> "DeviceArray":
        values = self.held[self._key(key)]
        return self._new(values) if isinstance(key, DeviceArray) else self._seen(values)

    def __setitem__(self, key: Any, value: Any) -> None:
        places = self._key(key)
        if isinstance(key, DeviceArray):
            assert len(np.unique(places)) == places.size, "which value stays is undefined"
        self.held[places] = self._operand(value)

    def _operand(self, value: Any) -> Any:
        if isinstance(value, DeviceArray):
            return value.held
        if isinstance(value, np.generic):
            assert value.dtype == self.held.dtype, f"{value.dtype} beside {self.held.dtype} depends on CuPy's version"
        elif not isinstance(value, bool | int | float):
            raise TypeError(f"Unsupported type {type(value)}")
        return value

    def _apply(self, name: str, *inputs: Any) -> "DeviceArray":
        operands = [self._operand(value) for value in inputs]
        if name == "matmul":
            assert all(operand.dtype == np.float64 and operand.ndim == 2 for operand in operands)
        with np.errstate(all="ignore"):
            return self._new(getattr(np, name)(*operands))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **more: Any) -> Any:
        known = ufunc.__name__ in UFUNCS and method == "__call__" and not more
        return self._apply(ufunc.__name__, *inputs) if known else NotImplemented

    def __array_function__(self, function: Any, _: Any, args: Any, more: dict[str, Any]) -> Any:
        if function.__name__ not in FUNCTIONS:
            return NotImplemented
        like = [a if isinstance(a, type) else self._operand(a) for a in args]
        return self._new(function(*like, **more))

    def __invert__(self) -> "DeviceArray":
        return self._apply("invert", self)


def _flushed(values: np.ndarray) -> np.ndarray:
    if values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < _SMALLEST, np.copysign(np.float32(0), values), values)


def _add_operators() -> None:
    def forward(name: str) -> Any:
        return lambda self, other: self._apply(name, self, other)

    def backward(name: str) -> Any:
        return lambda self, other: self._apply(name, other, self)

    def in_place(name: str) -> Any:
        def change(self: DeviceArray, other: Any) -> DeviceArray:
            result = self._apply(name, self, other)
            np.copyto(self.held, result.held, casting="same_kind")
            return self

        return change

    for operator, name in OPERATORS.items():
        setattr(DeviceArray, f"__{operator}__", forward(name))
        setattr(DeviceArray, f"__r{operator}__", backward(name))
        if operator in ("add", "sub"):
            setattr(DeviceArray, f"__i{operator}__", in_place(name))


_add_operators()


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
