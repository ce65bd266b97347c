"""NumPy or CuPy: where the arrays of a task live. The kernels themselves are the same."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from relexio.dtypes import Array
from relexio.errors import DeviceError

DEVICES = ("auto", "cpu", "cuda")


def resolve(device: str) -> str:
    """``cpu`` or ``cuda``, for ``auto`` whichever is there.

    Raises DeviceError if ``cuda`` is asked for and CuPy or a GPU is missing.
    """
    if device == "cpu":
        return "cpu"
    problem = _cuda_problem()
    if problem is None:
        return "cuda"
    if device == "cuda":
        raise DeviceError(
            f"--device cuda: {problem}; use --device cpu, or install relexio[gpu] on a machine with a GPU"
        )
    return "cpu"


def _cuda_problem() -> str | None:
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no GPU can be used ({error})"
    return None


@contextmanager
def limited(device: str, limit: int) -> Iterator[None]:
    """Hold the device's memory pool under ``limit`` bytes while inside."""
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
        pool.set_limit(size=before)


def free_device_bytes() -> int:
    """Bytes of device memory that are free now."""
    import cupy

    return int(cupy.cuda.runtime.memGetInfo()[0])


def out_of_memory() -> tuple[type[BaseException], ...]:
    """The exceptions by which a device says that an allocation did not fit; none without CuPy."""
    try:
        import cupy
    except ImportError:
        return ()
    return (cupy.cuda.memory.OutOfMemoryError,)


def to_device(array: np.ndarray, device: str) -> Array:
    """The array on the device; itself on the CPU."""
    if device != "cuda":
        return array
    import cupy

    return cupy.asarray(array)


def zeros(shape: tuple[int, ...], device: str) -> Array:
    """Float64 zeros on the device."""
    if device != "cuda":
        return np.zeros(shape)
    import cupy

    return cupy.zeros(shape)


def to_host(array: Array) -> np.ndarray:
    """The array as NumPy's."""
    return array if isinstance(array, np.ndarray) else array.get()
