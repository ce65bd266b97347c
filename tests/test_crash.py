"""Killed at any moment: the store holds its last commit, no output is half-written, and the same command finishes."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from relexio import atomic
from relexio.errors import StorageError
from relexio.store.opening import open_store
from relexio.store.storage import LocalStorage
from tests.support.command import HELD, Relexio, in_process, snapshot
from tests.support.make import BF16, Run, make_run
from tests.support.steps import fit_run, predict_run, small_blocks, store_run

SHAPES = {f"model.layers.{i}.w": (700, 300) for i in range(6)}


def kill_during(arguments: list[object], after: float) -> bool:
    """Start the command line, kill it after some seconds; True if it was still running."""
    process = subprocess.Popen(
        [sys.executable, "-m", "relexio", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("killed"), steps=tuple(range(1, 25)), shapes=SHAPES)


@pytest.mark.slow
def test_convert_killed_at_random(run: Run, tmp_path: Path) -> None:
    rng = random.Random(0)
    out, whole = tmp_path / "run.zarr", tmp_path / "whole.zarr"
    first = ["convert", run.steps_path, "--base", run.base_path, "--steps", "1:12", "-o"]
    more = ["convert", run.steps_path, "-o"]
    begun = time.perf_counter()
    assert in_process(*first, whole).code == 0
    lasts = time.perf_counter() - begun
    assert in_process(*more, whole).code == 0
    for stage, held in ((first, ()), (more, tuple(range(1, 13)))):
        for _ in range(5):
            kill_during([*stage, out], rng.uniform(0.2, lasts))
            if out.exists():
                assert open_store(out).steps in (held, held + stage_steps(stage))
        done = in_process(*stage, out)
        assert done.code == 0, done.err
    assert snapshot(out) == snapshot(whole)
    assert not list(tmp_path.glob("*.relexio-partial"))


def stage_steps(stage: list[object]) -> tuple[int, ...]:
    return tuple(range(1, 13)) if "--base" in stage else tuple(range(13, 25))


@pytest.mark.slow
def test_predict_killed_at_random(run: Run, tmp_path: Path) -> None:
    rng = random.Random(1)
    store = tmp_path / "run.zarr"
    assert in_process("convert", run.steps_path, "--base", run.base_path, "-o", store).code == 0
    before = snapshot(store)
    want = tmp_path / "want"
    predict = ["predict", store, "--method", "relex", "--step", 100, "-o"]
    for i in range(6):
        out = tmp_path / f"out-{i}"
        kill_during([*predict, out], rng.uniform(0.2, 1.6))
        assert not out.exists() or ((out / "relexio.json").is_file() and len(list(out.iterdir())) == 5)
        if not out.exists():
            assert in_process(*predict, out).code == 0
        assert not list(tmp_path.glob("*.relexio-partial"))
        want = want if want.exists() else out
        assert snapshot(out) == snapshot(want)
    kept = {name: content for name, content in snapshot(store).items() if not name.startswith("cache/")}
    assert kept == before


def test_ctrl_c_says_how_to_go_on(run: Run, tmp_path: Path) -> None:
    go, convert = tmp_path / "go", ["convert", run.steps_path, "--base", run.base_path, "-o", tmp_path / "run.zarr"]
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, str(go), *map(str, convert)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "run.zarr.relexio-partial").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    go.touch()  # it cannot have ended before
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in err and "again" in err
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.parametrize("strike", range(1, 60, 6))
def test_a_disk_that_fills_up_while_converting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strike: int) -> None:
    """Every n-th write of the store fails once; the error is clear, what was committed stays, the next run finishes."""
    import zarr.storage._local as local

    small_blocks(monkeypatch, 256)
    made = make_run(tmp_path, steps=(1, 2, 3))
    store_run(made, tmp_path / "whole.zarr", "1")
    store_run(made, tmp_path / "whole.zarr")
    store_run(made, tmp_path / "run.zarr", "1")
    calls: list[Path] = []

    def striking(real: Callable[..., object]) -> Callable[..., object]:
        def put(path: Path, *rest: object, **more: object) -> object:
            calls.append(path)
            if len(calls) == strike:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return real(path, *rest, **more)

        return put

    with monkeypatch.context() as disk:
        disk.setattr(local, "_put", striking(local._put))
        disk.setattr(LocalStorage, "put", striking(LocalStorage.put))
        try:
            store_run(made, tmp_path / "run.zarr")
        except StorageError as error:
            assert "free space" in str(error)
            assert open_store(tmp_path / "run.zarr").steps == (1,)
    assert len(calls) >= strike, "the disk did fail"
    store_run(made, tmp_path / "run.zarr")
    assert snapshot(tmp_path / "run.zarr") == snapshot(tmp_path / "whole.zarr")


@pytest.mark.parametrize("call", ["pwrite", "sync_tree", "rename", "posix_fallocate"])
def test_a_disk_that_fails_while_predicting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relexio: Relexio, call: str
) -> None:
    made = make_run(tmp_path, BF16, steps=(1, 2, 3))
    fitted = fit_run(store_run(made, tmp_path / "run.zarr"))

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr({"rename": Path, "sync_tree": atomic}.get(call, os), call, fail)
    with pytest.raises(StorageError, match="free space"):
        predict_run(fitted, 50, tmp_path / "out")
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "run.zarr", "steps"]
    predict_run(fitted, 50, tmp_path / "out")


INTERRUPTED = """import atexit, os, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == when: os.kill(os.getpid(), signal.SIGINT)
when = sys.argv.pop(1)
sys.meta_path.insert(0, Finder())
if when == "exit": atexit.register(os.kill, os.getpid(), signal.SIGINT)
from relexio.cli.entry import main
main()"""


@pytest.mark.parametrize("when", ["relexio.cli.main", "click", "relexio.cli.convert", "numpy", "dask.base", "exit"])
def test_ctrl_c_while_it_starts_or_ends(run: Run, tmp_path: Path, when: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, when, "convert", run.steps_path, "--base", run.base_path, "--dry-run"]
    done = subprocess.run([*map(str, command), "-o", tmp_path / "out"], capture_output=True, text=True, timeout=600)
    if when == "exit":  # too late: the work is done
        assert (done.returncode, done.stderr) == (0, "")
        return
    assert done.returncode == 130
    assert [line[:12] for line in done.stderr.splitlines() if line] == ["interrupted:"], done.stderr


SWALLOWED = """
import os, signal, sys, time
from relexio.cli import entry, main
class Dropped:
    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)
def work():
    held = Dropped()
    del held
    time.sleep(600)
entry._PATIENCE, main.main = 1, work
entry.main()"""


def test_told_to_end_while_python_drops_what_is_raised() -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM and done.stderr.startswith("interrupted:")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    ["--every 40", "--every 0 --kills 2 --interrupts 2", "--every 0 --flips 40", "--every 0 --mixes 20"],
    ids=["killed at writes", "killed and interrupted at random", "damaged", "mixed"],
)
def test_a_short_run_of_the_tool_loses_nothing(tmp_path: Path, options: str) -> None:
    """Killed, interrupted and damaged in many places; docs/reliability.md has a long run."""
    tool, none = (
        Path(__file__).parents[1] / "tools" / "attack" / "reliability.py",
        ["--kills", "--interrupts", "--flips", "--mixes"],
    )
    command = [sys.executable, tool, "--scratch", tmp_path, *(text for name in none for text in (name, "0"))]
    done = subprocess.run(list(map(str, [*command, *options.split()])), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "\n0 problems" in done.stdout
