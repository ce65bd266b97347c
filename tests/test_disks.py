"""Real file systems that are full, read-only, not ours or gone; two at once; and what is synced before what."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zarr.storage._local as zarr_local

from relexio import atomic
from relexio.store.opening import open_store
from relexio.store.storage import LocalStorage, locate
from tests.support.command import (
    HELD,
    Outcome,
    Relexio,
    in_process,
    in_turn,
    refused,
    snapshot,
    whole,
    without_progress,
)
from tests.support.make import BF16, Run, make_run
from tests.support.steps import small_blocks

SHAPES = {f"model.layers.{i}.w": (60, 400) for i in range(6)}
#: The command line as a user who owns nothing. What it imports is loaded before: it may lie where only root can read.
NOBODY = """import importlib, os, sys
for verb in ("convert", "inspect", "predict", "verify"):
    importlib.import_module(f"relexio.verbs.{verb}")
    importlib.import_module(f"relexio.cli.{verb}")
import difflib, dask.array, dask.threaded, relexio.api, safetensors.numpy, zarr.codecs
from relexio.cli.main import main
os.setgroups([]), os.setgid(65534), os.setuid(65534)
main()"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, BF16, steps=(1, 2, 3, 4), shapes=SHAPES)


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of four megabytes, or as the test's parameter asks."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    options = getattr(request, "param", "size=4m")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, left: int) -> Path:
    """Fill a disk but for some bytes, if it is not filled yet."""
    filler = disk / "filler"
    if not filler.exists():
        filler.write_bytes(bytes(atomic.free_bytes(disk) - left))
    return filler


@pytest.mark.parametrize("left", [0, 8 << 10, 60 << 10, 200 << 10, 320 << 10])
def test_a_full_disk(run: Run, disk: Path, relexio: Relexio, left: int) -> None:
    out = disk / "run.zarr"
    first, more = [run.steps_path, "--base", run.base_path, "--steps", "1:2", "-o", out], [run.steps_path, "-o", out]
    filler = fill(disk, left)
    refused(relexio("convert", *first), str(disk), "bytes are left", "in all")
    assert not out.exists()
    filler.unlink()
    assert relexio("convert", *first).code == 0
    whole(relexio, out, (1, 2))
    before = snapshot(out)
    filler = fill(disk, min(left, 60 << 10))
    refused(relexio("convert", *more), str(disk), "bytes are left", "in all")
    assert open_store(out).steps == (1, 2) and relexio("verify", out).code == 0
    now = snapshot(out)
    assert all(now[name] == data for name, data in before.items())
    filler.unlink()
    assert relexio("convert", *more).code == 0
    whole(relexio, out, (1, 2, 3, 4))


@pytest.mark.parametrize("disk", ["size=100m,nr_inodes=60"], indirect=True)
def test_a_disk_without_inodes(run: Run, tmp_path: Path, disk: Path, relexio: Relexio) -> None:
    """Bytes are free, and freeing more of them would not help."""
    arguments = [run.steps_path, "--base", run.base_path, "-o"]
    done = relexio("convert", *arguments, disk / "run.zarr")
    refused(done, str(disk), "no inode is left on its disk", "remove files")
    assert "bytes" not in done.err and "(at most" not in done.err
    assert relexio("convert", *arguments, tmp_path / "run.zarr").code == 0
    while os.statvfs(disk).f_favail:
        tempfile.mkstemp(dir=disk)
    refused(
        relexio("predict", tmp_path / "run.zarr", "--method", "relex", "--step", 9, "-o", disk / "out"),
        "no inode is left on its disk",
    )


@pytest.mark.slow
def test_a_report_that_does_not_fit_leaves_nothing(run: Run, tmp_path: Path, disk: Path, relexio: Relexio) -> None:
    """So that the same command is not stopped by what it left; whichever file is too much."""
    pytest.importorskip("altair")
    store = tmp_path / "run.zarr"
    assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", store).code == 0
    assert relexio("report", store, "-o", tmp_path / "run.html", "--png", tmp_path / "png").code == 0
    page, pictures = (tmp_path / "run.html").stat().st_size, atomic.tree_bytes(tmp_path / "png")
    command = ["report", store, "-o", disk / "run.html", "--png", disk / "png"]
    for left in (page + pictures // 2, pictures // 2):
        filler = fill(disk, left)
        refused(relexio(*command), str(disk), "bytes are left")
        assert [path.name for path in disk.rglob("*") if path.is_file()] == ["filler"]
        filler.unlink()
    assert relexio(*command).code == 0


def test_a_full_disk_and_a_prediction(run: Run, tmp_path: Path, disk: Path, relexio: Relexio) -> None:
    out = disk / "run.zarr"
    assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", out).code == 0
    before, filler = snapshot(out), fill(disk, 4 << 10)
    refused(relexio("predict", out, "--method", "relex", "--step", 9, "-o", disk / "out"), str(disk), "needed", "free")
    elsewhere = relexio("predict", out, "--method", "relex", "--step", 9, "-o", tmp_path / "out")
    assert elsewhere.code == 0, "a fit that cannot be kept is no reason to fail"
    assert {path: data for path, data in snapshot(out).items() if path != "cache/zarr.json"} == before
    filler.unlink()
    assert relexio("predict", out, "--method", "relex", "--step", 9, "-o", disk / "out").code == 0
    assert snapshot(disk / "out") == snapshot(tmp_path / "out")
    assert sorted(p.name for p in (out / "cache").iterdir()) == ["gram-0004", "zarr.json"]


def test_a_disk_that_fills_up_while_predicting(
    run: Run, disk: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = disk / "run.zarr"
    assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", out).code == 0
    monkeypatch.setattr("relexio.verbs.predict.check_targets", lambda store, targets: fill(disk, 100 << 10))
    refused(
        relexio("predict", out, "--method", "relex", "--step", 9, "-o", disk / "out"),
        str(disk / "out"),
        "bytes are left",
    )
    assert sorted(p.name for p in disk.iterdir()) == ["filler", "run.zarr"]


def test_a_disk_that_turns_read_only(run: Run, tmp_path: Path, disk: Path, relexio: Relexio) -> None:
    out = disk / "run.zarr"
    assert relexio("convert", run.steps_path, "--base", run.base_path, "--steps", "1:2", "-o", out).code == 0
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    refused(relexio("convert", run.steps_path, "-o", out), str(disk), "read-only")
    refused(relexio("predict", out, "--method", "relex", "--step", 9, "-o", disk / "out"), str(disk))
    assert relexio("predict", out, "--method", "relex", "--step", 9, "-o", tmp_path / "out").code == 0
    whole(relexio, out, (1, 2))
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert relexio("convert", run.steps_path, "-o", out).code == 0
    whole(relexio, out, (1, 2, 3, 4))


@pytest.mark.slow
def test_a_directory_that_is_not_ours(open_folder: Path) -> None:
    def nobody(*arguments: object) -> Outcome:
        command = [sys.executable, "-c", NOBODY, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=600)
        return Outcome(done.returncode, done.stdout, without_progress(done.stderr))

    run, out, theirs = make_run(open_folder), open_folder / "run.zarr", open_folder / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    command = ["convert", run.steps_path, "--base", run.base_path, "-o"]
    refused(nobody(*command, out), str(open_folder), "permission")
    assert in_process(*command, out, "--steps", "1:2").code == 0
    before = snapshot(out)
    refused(nobody("convert", run.steps_path, "-o", out), str(out), "permission")
    refused(
        nobody("predict", out, "--method", "relex", "--step", 9, "-o", open_folder / "out"),
        str(open_folder),
        "permission",
    )
    assert nobody("predict", out, "--method", "relex", "--step", 9, "-o", theirs / "out").code == 0
    assert nobody("verify", out).code == 0
    (out / "segments/0000/changed/zarr.json").chmod(0)
    refused(nobody("inspect", out), "segments/0000/changed", "ermission")
    refused(nobody("verify", out), "segments/0000/changed", "ermission")
    assert snapshot(out) == before
    assert sorted(p.name for p in open_folder.iterdir()) == ["base", "run.zarr", "steps", "theirs"]


@pytest.mark.parametrize("strike", [1, 3, 8, 15, 20])
@pytest.mark.parametrize("command", ["convert", "append"])
def test_a_directory_that_is_moved_away(
    run: Run, tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch, command: str, strike: int
) -> None:
    """Nothing takes its name; back in its place, the same command goes on."""
    small_blocks(monkeypatch, 8192)
    disk, away = tmp_path / "disk", tmp_path / "away"
    disk.mkdir()
    out = disk / "run.zarr"
    arguments = [run.steps_path, "--base", run.base_path, "-o", out]
    if command == "append":
        assert relexio("convert", *arguments, "--steps", "1:2").code == 0
    calls = []

    def put(where: LocalStorage, key: str, data: bytes) -> None:
        calls.append(key)
        if len(calls) == strike:
            disk.rename(away)
        real(where, key, data)

    real = LocalStorage.put
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "put", put)
        refused(relexio("convert", *arguments), str(disk))
    assert len(calls) >= strike and not disk.exists()
    away.rename(disk)
    assert relexio("convert", *arguments).code == 0
    whole(relexio, out, (1, 2, 3, 4))


def test_a_directory_that_goes_while_one_is_made_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's write is under way when the disk goes: it fails, and makes nothing in its place."""
    disk, away = tmp_path / "disk", tmp_path / "away"
    (disk / "run.zarr").mkdir(parents=True)
    real = os.mkdir

    def mkdir(*arguments: Any, **more: Any) -> None:
        if not away.exists():
            disk.rename(away)
        real(*arguments, **more)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(FileNotFoundError):
        LocalStorage(str(disk / "run.zarr")).put("segments/0000/c/0", b"")
    assert away.exists() and not disk.exists()


class Disk:
    """What would be lost if the power failed now: paths whose content, or whose list of names, is not on the disk yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dirty: set[Path] = set()
        self.lost: list[str] = []
        self.commits: list[Path] = []
        patch = monkeypatch.setattr
        patch(Path, "write_bytes", self.writing(Path.write_bytes, lambda path, *_: path))
        patch(zarr_local, "_put", self.writing(zarr_local._put, lambda path, *_: path))
        patch(os, "pwrite", self.writing(os.pwrite, lambda fd, *_: self.path(fd)))
        for name in ("replace", "rename"):
            patch(os, name, self.renaming(getattr(os, name)))
        patch(os, "mkdir", in_turn(os.mkdir, lambda path, *_: self.wrote(Path(path))))
        patch(os, "fsync", in_turn(os.fsync, lambda fd: self.dirty.discard(self.path(fd))))
        patch(ctypes, "CDLL", lambda *rest, **more: SimpleNamespace(syncfs=self.syncfs))

    def path(self, fd: int) -> Path:
        return Path(f"/proc/self/fd/{fd}").readlink()

    def wrote(self, path: Path) -> None:
        self.dirty |= {path.absolute(), path.absolute().parent}

    def syncfs(self, fd: int) -> int:
        self.dirty.clear()
        return 0

    def writing(self, real: Callable[..., Any], path_of: Callable[..., Path]) -> Callable[..., Any]:
        def write(*arguments: Any, **more: Any) -> Any:
            self.wrote(path_of(*arguments))
            return real(*arguments, **more)

        return write

    def renaming(self, real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, target: Any) -> None:
            source, target = Path(source).absolute(), Path(target).absolute()
            marker = target.name == "zarr.json" and target.parent.name == "run.zarr"
            if marker or target.name in ("run.zarr", "out"):
                held = target.parent if marker else source
                data = [path for path in self.dirty if path == source or held in path.parents]
                self.lost += [f"{target} is there before {p}" for p in data]
                self.commits.append(target)
            real(source, target)
            if source in self.dirty:
                self.dirty = self.dirty - {source} | {target}
            self.dirty.add(target.parent)

        return rename

    def problems(self) -> list[str]:
        """What was committed before its data, and commits that are not on the disk themselves at the end."""
        return self.lost + [f"{path.parent} is not synced" for path in self.commits if path.parent in self.dirty]


REMOVED = [None, "sync", "sync_tree"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("removed", REMOVED, ids=str)
@pytest.mark.parametrize("command", ["convert", "append", "predict", "restore"])
def test_data_is_on_the_disk_before_what_names_it(
    run: Run, tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch, command: str, removed: str | None
) -> None:
    """And the name itself when the command ends. Where a sync is taken away, this test sees it."""
    store, out = tmp_path / "run.zarr", tmp_path / "out"
    convert = ["convert", run.steps_path, "--base", run.base_path, "-o", store]
    arguments = {"predict": ["predict", store, "--method", "relex", "--step", 9, "-o", out], "append": convert}.get(
        command, convert
    )
    if command == "restore":
        arguments = ["restore", store, "--step", 2, "-o", out]
    if command != "convert":
        assert relexio(*convert, "--steps", "1:2").code == 0
    with monkeypatch.context() as patch:
        if removed:
            patch.setattr(atomic, removed, lambda path: None)
        disk = Disk(patch)
        assert relexio(*arguments).code == 0
    made = {"convert": [store], "append": [store / "zarr.json"]}.get(command, [out])
    assert disk.commits == made
    assert bool(disk.problems()) == bool(removed), disk.problems()


def test_one_writes_and_others_read(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    """A second writer is refused at once and told who the first is; readers see the last commit, whatever goes on."""
    store = tmp_path / "run.zarr"
    convert = ["convert", run.steps_path, "--base", run.base_path, "-o", store]
    assert relexio(*convert, "--steps", "1:2").code == 0
    command = [sys.executable, "-c", HELD, str(tmp_path / "go"), *map(str, convert), "--workers", "1"]
    writer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not (store / "segments/0001/zarr.json").exists() and writer.poll() is None:
            time.sleep(0.01)
        second = in_process(*convert)  # while the first is held, so that it cannot have waited for it
        assert writer.poll() is None
        refused(second, "is writing it")
        assert f"process {writer.pid} is" in second.err or "another process is" in second.err
        seen = set()
        while writer.poll() is None:
            done = relexio("predict", store, "--method", "relex", "--step", 9, "-o", tmp_path / "out")
            assert done.code == 0, done.err
            assert relexio("verify", store).code == 0
            seen.add((tmp_path / "out" / "model.safetensors").read_bytes())
            (tmp_path / "go").touch()
            shutil.rmtree(tmp_path / "out")
    finally:
        (tmp_path / "go").touch()
        _, err = writer.communicate(timeout=600)
    assert writer.returncode == 0, err
    want = set()
    for window in ("1:2", "1:4"):
        out = tmp_path / window
        assert relexio("predict", store, "--method", "relex", "--step", 9, "--window", window, "-o", out).code == 0
        want.add((out / "model.safetensors").read_bytes())
    assert seen and seen <= want and len(want) == 2
    whole(relexio, store, (1, 2, 3, 4))


def test_a_kept_fit_that_another_process_finishes_meanwhile(
    run: Run, tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was seen in the cache a moment ago may have got its name, or be gone."""
    store = tmp_path / "run.zarr"
    assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", store).code == 0
    real = LocalStorage.names
    monkeypatch.setattr(LocalStorage, "names", lambda where: [*real(where), f"gram-0000-x{atomic.PARTIAL}"])
    assert relexio("predict", store, "--method", "relex", "--step", 9, "-o", tmp_path / "out").code == 0
    assert (store / "cache/gram-0004").exists()


def test_a_write_that_comes_after_the_error_leaves_nothing(tmp_path: Path) -> None:
    """Zarr writes several files at once: when one fails, another may still be under way."""

    def late(path: Path) -> None:
        time.sleep(0.02)
        path.mkdir(parents=True, exist_ok=True)
        (path / "zarr.json").write_text("{}")

    with pytest.raises(OSError, match="full"), locate(tmp_path / "cache" / "fit").building() as building:
        writer = threading.Thread(target=late, args=(Path(building.address),))
        writer.start()
        raise OSError(errno.ENOSPC, "full")
    writer.join()
    assert list((tmp_path / "cache").iterdir()) == []
