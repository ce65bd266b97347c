"""What ``convert`` asks a disk for before it reads it. One that answers late gives its bandwidth only to many reads in flight."""

import os
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.engine.resources import Resources
from relexio.verbs.convert import encode, write
from tests.support.make import BF16, Run, make_run
from tests.support.steps import small_blocks, store_run

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")

#: A large tensor, many small ones, another large one: 138,000 elements.
SHAPES = {"a": (300, 256), **{f"b.{i:02}": (40,) for i in range(30)}, "c": (200, 300)}
PORTION = 128 << 10  # what Linux reads ahead for one advice, unless it was told otherwise
OPEN = Path("/proc/self/fd")
ONE = Resources(device="cpu", workers=1)


class Disk:
    """Every advice and read of files that end in ``safetensors``, and which bytes were asked for and not read yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(1 << 20, bool))
        self.advice: list[tuple[str, int, int]] = []
        self.unasked, self.outstanding, self.open = 0, [0], [0]
        self.lock, self.idle = threading.Lock(), len([*OPEN.iterdir()])
        real = os.posix_fadvise, os.preadv

        def fadvise(fd: int, start: int, nbytes: int, advice: int) -> None:
            with self.lock:
                path = str((OPEN / str(fd)).readlink())
                self.advice.append((path, start, nbytes))
                self.asked[path][start : start + nbytes] = True
            real[0](fd, start, nbytes, advice)

        def preadv(fd: int, buffers: list[Any], start: int) -> int:
            with self.lock:
                self.outstanding.append(sum(int(asked.sum()) for asked in self.asked.values()))
                self.open.append(len([*OPEN.iterdir()]) - self.idle)
                part = self.asked[str((OPEN / str(fd)).readlink())][start : start + len(buffers[0])]
                self.unasked += int((~part).sum())
                part[:] = False
            return real[1](fd, buffers, start)

        monkeypatch.setattr(os, "posix_fadvise", fadvise)
        monkeypatch.setattr(os, "preadv", preadv)

    def forget(self) -> None:
        """What was asked and read so far."""
        self.asked.clear()
        self.advice.clear()
        self.unasked, self.outstanding, self.open = 0, [], []


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Four steps and a base, in blocks of 65,536 elements."""
    small_blocks(monkeypatch, 1 << 16)
    return make_run(tmp_path, BF16, (1, 2, 3, 4), shapes=SHAPES)


def convert(run: Run, monkeypatch: pytest.MonkeyPatch, each: Callable[[Disk], None]) -> None:
    """Convert a run; call ``each`` after every block, with what was asked and read for it."""
    disk, real = Disk(monkeypatch), encode.encode_block

    def encode_block(*arguments: Any) -> Any:
        disk.forget()
        result = real(*arguments)
        each(disk)
        return result

    monkeypatch.setattr(write, "encode_block", encode_block)
    store_run(run, run.steps_path.parent / "run.zarr", resources=ONE)


def test_a_block_is_asked_for_before_it_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its tensors, small ones too, in every state; and by no advice of which Linux would take but a part."""
    blocks = []

    def each(disk: Disk) -> None:
        assert disk.unasked == 0 and max(nbytes for *_, nbytes in disk.advice) <= PORTION
        assert disk.outstanding[0] == max(disk.outstanding)  # nothing is asked for later
        blocks.append(disk.outstanding[0])

    convert(run, monkeypatch, each)
    assert sum(blocks) == pytest.approx(5 * 2 * 138_000, rel=0.05)  # pages that two blocks share count twice


def test_what_is_asked_for_and_not_read_is_bounded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps and workers there are: page cache that is not read in time would be read twice."""
    monkeypatch.setattr(encode, "_AHEAD", 1 << 16)
    monkeypatch.setattr(encode, "_CACHED", 1 << 12)
    monkeypatch.setattr(encode, "_READ", 1 << 9)
    most = []

    def each(disk: Disk) -> None:
        assert disk.unasked == 0
        most.append(max(disk.outstanding))

    convert(run, monkeypatch, each)
    assert len(most) == 3 and 1 << 16 < max(most) < 3 << 16  # a block has 655,360 bytes in all states


@pytest.mark.parametrize(("ahead", "most"), [(1, 2 * 5), (25, 25 + 2 * 5)])
def test_files_that_are_open_are_bounded(run: Run, monkeypatch: pytest.MonkeyPatch, ahead: int, most: int) -> None:
    monkeypatch.setattr("relexio.verbs.convert.write.OPEN_AHEAD", ahead)
    found = []
    convert(run, monkeypatch, lambda disk: found.append(max(disk.open)))
    assert 5 <= max(found) <= most


def test_a_sample_is_asked_for_before_it_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample that may raise a doubt of the base has five hundred pieces, on a disk that answers after 20 ms ten seconds."""
    disk, real, counts = Disk(monkeypatch), encode.read_bits, []

    def read_bits(*arguments: Any) -> np.ndarray:
        counts.append(len(set(disk.advice)))
        return real(*arguments)

    monkeypatch.setattr("relexio.verbs.convert.before.read_bits", read_bits)
    store_run(run, run.steps_path.parent / "run.zarr", resources=ONE)
    assert len(counts) > 100 and len(set(counts)) == 1
