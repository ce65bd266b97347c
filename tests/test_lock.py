"""One writer at a time, also where another ends between the opening and the locking of its directory."""

import fcntl
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from relexio import atomic
from relexio.atomic import locked, staging
from relexio.errors import BusyError
from relexio.store import cache
from relexio.store.opening import open_store
from relexio.store.storage import locate
from relexio.sweep.files import Files
from tests.support.command import Relexio, in_process, in_turn, refused, snapshot, whole
from tests.support.make import Run, make_run

Meanwhile = Callable[[Callable[[], object]], None]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Do something right before the next lock is taken: its directory is open already."""

    def once(what: Callable[[], object]) -> None:
        waiting = [what]

        def flock(fd: int, how: int) -> None:
            while waiting:
                waiting.pop()()
            real(fd, how)

        monkeypatch.setattr(fcntl, "flock", flock)

    real = fcntl.flock
    return once


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, steps=(1, 2, 3, 4), shapes={"model.norm.weight": (24,), "w": (40, 24)})


def held(directory: Path) -> bool:
    """Whether anybody holds the lock of a directory."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def replaced(directory: Path, by: Path) -> None:
    directory.rename(by)
    directory.mkdir()


def test_the_lock_is_that_of_the_name(tmp_path: Path, meanwhile: Meanwhile) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    meanwhile(lambda: replaced(one, other))
    with locked(one):
        assert held(one) and not held(other)
    assert not held(one)


def test_the_new_one_is_locked_already(tmp_path: Path, meanwhile: Meanwhile) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    with ExitStack() as stack:
        meanwhile(in_turn(lambda: replaced(one, other), lambda: stack.enter_context(locked(one))))
        with pytest.raises(BusyError, match="is writing it"), locked(one):
            pass


def test_what_is_locked_has_gone(tmp_path: Path, meanwhile: Meanwhile) -> None:
    one = tmp_path / "one"
    one.mkdir()
    meanwhile(one.rmdir)
    with pytest.raises(FileNotFoundError), locked(one):
        pass
    meanwhile(lambda: one.rmdir())
    with locked(one, make=True):
        assert held(one)
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none" / "below", make=True):
        pass


def test_it_ends_where_the_directory_never_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tmp_path / "one"
    monkeypatch.setattr(fcntl, "flock", lambda *_: one.rmdir())
    with pytest.raises(BusyError, match="keep creating and removing it"), locked(one, make=True):
        pass
    open_files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0  # noqa: PTH208
    assert open_files < 100 or not open_files, "what was opened in vain is closed again"


def test_another_convert_has_ended(run: Run, tmp_path: Path, relexio: Relexio, meanwhile: Meanwhile) -> None:
    """What the second one is told is true: run again, it adds its steps."""
    store = tmp_path / "run.zarr"
    convert = ["convert", run.steps_path, "--base", run.base_path, "-o", store]
    meanwhile(lambda: in_process(*convert, "--steps", "1:2"))
    refused(relexio(*convert), "was created by something else meanwhile; run again to add to it")
    whole(relexio, store, (1, 2))
    assert relexio(*convert).code == 0
    whole(relexio, store, (1, 2, 3, 4))


def test_another_convert_has_ended_before_ours_makes_its_directory(
    run: Run, tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "run.zarr"
    convert = ["convert", run.steps_path, "--base", run.base_path, "-o", store]

    def convert_later(*arguments: Any) -> Any:
        monkeypatch.setattr("relexio.verbs.convert.convert", real)
        assert in_process(*convert, "--steps", "1:2").code == 0
        return real(*arguments)

    from relexio.verbs.convert import convert as real

    monkeypatch.setattr("relexio.verbs.convert.convert", convert_later)
    refused(relexio(*convert), "was created by something else meanwhile; run again to add to it")
    whole(relexio, store, (1, 2))


def test_another_convert_has_failed(run: Run, tmp_path: Path, relexio: Relexio, meanwhile: Meanwhile) -> None:
    """It has removed its directory, which is also ours; a third one may have begun anew."""
    store = tmp_path / "run.zarr"
    convert = ["convert", run.steps_path, "--base", run.base_path, "-o", store]
    with ExitStack() as third:
        meanwhile(in_turn(staging(store).rmdir, lambda: third.enter_context(locked(staging(store), make=True))))
        refused(relexio(*convert), "is writing it; wait for it to end")
        assert not store.exists() and list(staging(store).iterdir()) == []
    meanwhile(staging(store).rmdir)
    assert relexio(*convert).code == 0
    whole(relexio, store, (1, 2, 3, 4))


def test_another_prediction_has_ended(run: Run, tmp_path: Path, relexio: Relexio, meanwhile: Meanwhile) -> None:
    store, out = tmp_path / "run.zarr", tmp_path / "out"
    assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", store).code == 0
    predict = ["predict", store, "--method", "relex", "--step", 9, "-o", out]
    assert relexio(*predict[:-1], tmp_path / "other").code == 0  # the fit is kept: the next lock is that of the output
    meanwhile(lambda: in_process(*predict))
    refused(relexio(*predict), "was created by something else meanwhile; give another -o")
    assert snapshot(out) == snapshot(tmp_path / "other") and not staging(out).exists()
    shutil.rmtree(out)
    meanwhile(in_turn(staging(out).rmdir, staging(out).mkdir))
    assert relexio(*predict).code == 0
    assert snapshot(out) == snapshot(tmp_path / "other") and not staging(out).exists()


@pytest.mark.parametrize("ended", [True, False])
def test_a_fit_that_another_process_clears_away(
    run: Run, tmp_path: Path, relexio: Relexio, meanwhile: Meanwhile, ended: bool
) -> None:
    """It takes a directory that is not locked yet for one that was left; the fit is kept all the same."""
    store = tmp_path / "run.zarr"
    assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", store).code == 0
    kept = locate(store).below("cache")
    with ExitStack() as other:

        def clear_away() -> None:
            if ended:
                cache._clear_away(kept, cache.CacheName("gram", 4), open_store(store))
            else:
                (name,) = set(kept.names()) - {"zarr.json"}
                other.enter_context(kept.below(name).locked())

        meanwhile(clear_away)
        done = relexio("predict", store, "--method", "relex", "--step", 9, "-o", tmp_path / "out")
        assert done.code == 0 and "not kept" not in done.err, done.err
    assert "gram-0004" in kept.names()
    assert len(kept.names()) == (2 if ended else 3), "with the group's own metadata"


def test_the_directory_of_a_sweep_has_gone(tmp_path: Path, meanwhile: Meanwhile) -> None:
    files = Files(tmp_path / "sweeps" / "one")
    meanwhile(files.top.rmdir)
    with files.opened():
        assert (files.top / "logs").is_dir() and held(files.top)
        with pytest.raises(BusyError), files.opened():
            pass


def test_what_is_renamed_takes_its_lock_along(tmp_path: Path) -> None:
    """So who builds something is its one writer until the very end, and its name is free for the next."""
    one, other = tmp_path / "one", tmp_path / "other"
    with locked(one, make=True):
        atomic.publish(one, other)
        assert held(other)
        with locked(one, make=True):
            pass
