"""This process: its heap, its resident memory, its cores, and the threads of its libraries."""

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h


def resident_bytes() -> int:
    """The resident size of this process now; where the system does not say, its peak so far."""
    status = Path("/proc/self/status")
    size = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if size:
        return int(size[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def use_one_heap() -> None:
    """Let all threads of this process share one heap that keeps its pages. Call it before threads are started.

    The C library gives every thread a heap of its own, and each keeps what it once needed: on a trajectory of 30 segments
    that was 100 MB more than with one heap. And it gives freed tiles back to the system, which has to clear every page
    anew for the next tile: with large tiles that took a fifth of the time of a pass.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # the GNU C library; others are left alone
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def keep_within(limit: int) -> None:
    """If this process is larger than ``limit`` bytes, give the system back those pages of its heap that are free.

    Where blocks leave small results between tiles of many sizes, tiles that are a little larger than the holes go on top of
    the heap, again and again: merging 1,473 blocks took 1.5 GB, of which 20 MB were in use.
    """
    if resident_bytes() > limit:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # the GNU C library
            libc.malloc_trim(0)


def allow_files(count: int) -> int:
    """Raise the limit of open files to a count, as far as the system lets this process; how many it may open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    if soft < count:
        soft = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
