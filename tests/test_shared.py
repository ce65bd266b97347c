"""A trajectory that several users share: what one has kept there, another can read or does without."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from relexio import atomic
from relexio.store.storage import locate
from tests.support.command import Outcome, Relexio, refused, snapshot
from tests.support.make import Run, make_run

#: The command line as a user who owns nothing. What it imports is loaded before: it may lie where only root can read.
NOBODY = """import contextlib, importlib, io, json, os, pkgutil, sys
import difflib, dask.array, dask.threaded, safetensors.numpy, zarr.codecs, relexio.cli, relexio.sweep, relexio.report
verbs = [found.name for found in pkgutil.walk_packages(relexio.__path__, "relexio.")]
for name in verbs:
    if name.startswith("relexio.loops."):
        continue  # imported as far as it can be
    if name.split(".")[1] not in ("__main__", "cluster", "demo", "integrations", "report") or name == "relexio.cli.report":
        importlib.import_module(name)
if '"report"' in sys.argv[1]:
    import altair, vl_convert, relexio.report.figures, relexio.report.page
    relexio.report.page._resource("page.js"), relexio.report.page._resource("page.css")
    altair.Chart({"values": [{"a": 1}]}).mark_point().encode(x="a:Q").to_dict()
from relexio.cli.main import main
os.setgroups([]), os.setgid(65534), os.setuid(65534)
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(command)
        except SystemExit as end:
            ended = end.code or 0
    print(json.dumps([ended, out.getvalue(), err.getvalue()]))"""


def nobody(cwd: Path, *commands: list[object]) -> list[Outcome]:
    """How commands of another user end."""
    asked = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", NOBODY, asked], capture_output=True, text=True, cwd=cwd, timeout=600)
    assert done.returncode == 0, done.stderr
    return [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture
def run(open_folder: Path) -> Run:
    return make_run(open_folder, steps=(1, 2, 3, 4), shapes={"model.norm.weight": (24,), "w": (40, 24)})


@pytest.fixture
def mask() -> Iterator[Callable[[int], int]]:
    """Set the umask of this process until the test has ended."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def as_umask_022(cache: Path) -> None:
    """As the owner's umask has it."""


def as_older_versions(cache: Path) -> None:
    next(cache.glob("gram-*")).chmod(0o700)


def listed_only(cache: Path) -> None:
    (cache / "gram-0004").chmod(0o744)


def one_file(cache: Path) -> None:
    (cache / "gram-0004" / "gram" / "zarr.json").chmod(0o600)


def one_chunk(cache: Path) -> None:
    next(path for path in (cache / "gram-0004" / "gram" / "c").rglob("*") if path.is_file()).chmod(0o600)


def all_of_it(cache: Path) -> None:
    cache.chmod(0o700)


@pytest.mark.parametrize(
    "closed",
    [
        all_of_it,
        *(
            pytest.param(f, marks=pytest.mark.slow)
            for f in (as_umask_022, as_older_versions, listed_only, one_file, one_chunk)
        ),
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.usefixtures("mask")
def test_another_user_comes_after_the_fit(
    run: Run, open_folder: Path, relexio: Relexio, closed: Callable[[Path], None]
) -> None:
    store, theirs = open_folder / "run.zarr", open_folder / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    predict = ["predict", store, "--method", "relex", "--step", 9, "-o"]
    assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", store).code == 0
    assert relexio(*predict, open_folder / "ours").code == 0
    closed(store / "cache")
    before = snapshot(store)
    commands = [
        [*predict, theirs / "plan", "--dry-run"],
        [*predict, theirs / "out"],
        ["verify", store],
        ["inspect", store],
    ]
    if closed in (as_older_versions, all_of_it):
        commands += [["backtest", store], ["findings", store]]
        commands += [["sweep", store, "--steps", 9, "--eval", "echo 1 # {checkpoint}", "-o", theirs / "sweep"]]
        commands += [["report", store, "-o", theirs / "page.html"]] if find_spec("vl_convert") else []
    found = nobody(theirs, *commands)
    assert [done.code for done in found] == [0] * len(commands), [done.err for done in found]
    plan, predicted, verified, *_ = found
    readable = closed is as_umask_022
    assert ("kept in the store if" not in plan.out) == readable
    assert ("the fit is not kept for later" not in predicted.err) == readable
    assert snapshot(theirs / "out") == snapshot(open_folder / "ours")
    assert "whole" in verified.out
    assert ("note: no permission to read kept fits, not checked: cache" not in verified.err) == readable
    assert snapshot(store) == before


@pytest.mark.usefixtures("mask")
def test_a_closed_fit_in_an_open_cache(run: Run, open_folder: Path, relexio: Relexio) -> None:
    """Who may write there does not touch it: it is another user's. What he makes with more steps is kept beside it."""
    store, theirs = open_folder / "run.zarr", open_folder / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    convert = ["convert", run.steps_path, "--base", run.base_path, "-o", store]
    assert relexio(*convert, "--steps", "1:3").code == 0
    assert relexio("predict", store, "--method", "relex", "--step", 9, "-o", open_folder / "ours").code == 0
    (store / "cache").chmod(0o777)
    as_older_versions(store / "cache")
    left = store / "cache" / f"gram-0003-left{atomic.PARTIAL}"
    left.mkdir(0o700)
    (done,) = nobody(theirs, ["predict", store, "--method", "relex", "--step", 9, "-o", theirs / "out"])
    assert done.code == 0, done.err
    assert snapshot(theirs / "out") == snapshot(open_folder / "ours")
    assert sorted(path.name for path in (store / "cache").iterdir()) == ["gram-0003", left.name, "zarr.json"]
    assert relexio(*convert).code == 0
    (done,) = nobody(theirs, ["predict", store, "--method", "relex", "--step", 9, "-o", theirs / "more"])
    assert done.code == 0 and "not kept" not in done.err, done.err
    assert (store / "cache" / "gram-0004").is_dir() and (store / "cache" / "gram-0003").is_dir()


@pytest.mark.usefixtures("mask")
def test_a_store_that_may_not_be_read_is_an_error(run: Run, open_folder: Path, relexio: Relexio) -> None:
    store = open_folder / "run.zarr"
    assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", store).code == 0
    for closed in (store / "base", store):
        closed.chmod(0o700)
        for done in nobody(open_folder, ["inspect", store], ["convert", run.steps_path, "-o", store]):
            refused(done, "ermission")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027, 0o077])
def test_everything_has_the_mode_that_the_umask_gives(
    tmp_path: Path, relexio: Relexio, mask: Callable[[int], int], umask: int
) -> None:
    mask(umask)
    run = make_run(tmp_path / "run", steps=(1, 2, 3, 4), shapes={"model.norm.weight": (24,)})
    made = tmp_path / "made"
    store = made / "run.zarr"
    assert relexio("convert", run.steps_path, "--base", run.base_path, "--steps", "1:3", "-o", store).code == 0
    assert relexio("convert", run.steps_path, "-o", store).code == 0
    assert relexio("predict", store, "--method", "relex", "--step", 9, "-o", made / "out").code == 0
    assert (
        relexio("predict", store, "--method", "relex", "--step", 9, "--solver", "blocks", "-o", made / "other").code
        == 0
    )
    assert relexio("restore", store, "--step", 2, "-o", made / "step").code == 0
    assert relexio("sweep", store, "--steps", 9, "--eval", "echo 1 # {checkpoint}", "-o", made / "sweep").code == 0
    atomic.write_new(made / "page.html", b"<html>")
    found = {str(p.relative_to(made)): p.stat().st_mode & 0o777 for p in [made, *made.rglob("*")]}
    wrong = {n: oct(m) for n, m in found.items() if m != ((0o777 if (made / n).is_dir() else 0o666) & ~umask)}
    assert len(found) > 100 and not wrong, wrong


def test_a_fit_that_another_user_has_just_finished(
    run: Run,
    open_folder: Path,
    relexio: Relexio,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And keeps to himself: ours is not taken for it."""
    store, seen = open_folder / "run.zarr", []

    def readable(where: object) -> bool:
        seen.append(where)
        return len(seen) > 1

    assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", store).code == 0
    monkeypatch.setattr("relexio.store.storage.LocalStorage.readable", readable)
    done = relexio("predict", store, "--method", "relex", "--step", 9, "-o", open_folder / "out")
    assert done.code == 0 and "not kept" in done.err and seen == [locate(store).below("cache/gram-0004")]


def test_kept_results_on_object_storage_that_may_not_be_read(
    run: Run, open_folder: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "memory://shared/run.zarr"
    predict = ["predict", url, "--method", "relex", "--step", 9, "-o"]
    assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", url).code == 0
    assert relexio(*predict, open_folder / "one").code == 0
    real = MemoryFileSystem.cat_file

    def cat_file(files: MemoryFileSystem, path: str, **more: object) -> bytes:
        if "/cache/" in path:
            raise PermissionError(errno.EACCES, "Access Denied")
        return bytes(real(files, path, **more))

    try:
        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
        done = relexio(*predict, open_folder / "two")
        assert done.code == 0 and "not kept" in done.err, done.err
        assert snapshot(open_folder / "one") == snapshot(open_folder / "two")
        verified = relexio("verify", url)
        assert verified.code == 0 and "not checked: cache/gram-0004;" in verified.err, verified.err
    finally:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


def test_what_else_is_wrong_with_a_kept_result_is_for_its_reader_to_say(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert locate(tmp_path).readable()
