"""Trajectories on object storage, against a real S3 server on this machine; and, in short, on any other of fsspec's."""

import gc
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import s3fs
from fsspec.registry import _registry
from moto.server import ThreadedMotoServer
from zarr.core.sync import sync

import relexio as package
from relexio.errors import BusyError, ExistsError, MissingError, RequestError, StorageError, StoreError
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.store.storage import LOCK, ObjectStorage, locate, objects
from relexio.store.store import Store
from relexio.verbs.convert import Request, convert, merge, prepare
from relexio.words import parse_steps
from tests.support.command import Relexio, snapshot
from tests.support.make import Run, make_run
from tests.support.steps import CPU, fit_run, predict_run, small_blocks

NOBODY = 2**22 + 1  # above any process id that Linux gives


@dataclass(frozen=True)
class Bucket:
    """A bucket of the server, looked into with another client than relexio's."""

    name: str
    client: Any

    def url(self, key: str = "run.zarr") -> str:
        return f"s3://{self.name}/{key}"

    def objects(self, key: str = "run.zarr") -> dict[str, bytes]:
        """All objects of a store, as ``snapshot`` has the files of a directory."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=f"{key}/")
        names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {name.removeprefix(f"{key}/"): self._get(name) for name in names}

    def _get(self, name: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=name)["Body"].read()

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def upload(self, store: Path) -> str:
        """Copy a local store into the bucket: that is quicker than a conversion, and the same."""
        for name, data in snapshot(store).items():
            self.put(f"run.zarr/{name}", data)
        return self.url()


@pytest.fixture(scope="module", autouse=True)
def client() -> Iterator[Any]:
    """A server, and what the environment must say for it."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for each request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        forget()
        made = boto3.client("s3")
        yield made
        made.close()
    forget()
    server.stop()


def forget() -> None:
    """No connection of an earlier test is used again; s3fs itself closes only those that are not asynchronous."""
    for files in list(s3fs.S3FileSystem._cache.values()):
        if files.asynchronous and files._s3 is not None:
            sync(files._s3.close())
    objects._asynchronous.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(client: Any, request: pytest.FixtureRequest) -> Bucket:
    name = f"b-{abs(hash(request.node.name)):x}"
    client.create_bucket(Bucket=name)
    return Bucket(name, client)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    shapes = {"model.embed_tokens.weight": (40, 24), "model.norm.weight": (24,)}
    return make_run(tmp_path_factory.mktemp("run"), steps=(10, 20, 30, 40), shapes=shapes)


@pytest.fixture(scope="module")
def stored(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local store of the first two steps."""
    out = tmp_path_factory.mktemp("stored") / "run.zarr"
    store_run(run, out, "10:20")
    return out


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local store of all steps at once."""
    out = tmp_path_factory.mktemp("whole") / "run.zarr"
    store_run(run, out)
    return out


def store_run(run: Run, out: str | Path, steps: str | None = None, base: bool = True) -> Store:
    request = Request(out, run.base_path if base else None, run.steps_path, {}, parse_steps(steps) if steps else None)
    return convert(prepare(request, CPU, silent), silent).store


def without_cache(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if not name.startswith("cache/")}


def lock_of(host: str, pid: int) -> bytes:
    return json.dumps({"host": host, "pid": pid, "user": "ann", "time": "2026-01-02T03:04:05+00:00"}).encode()


def test_the_same_bytes_as_on_disk(run: Run, bucket: Bucket, tmp_path: Path, relexio: Relexio) -> None:
    url, here = bucket.url("runs/grpo/run.zarr"), tmp_path / "run.zarr"
    for out in (url, here):
        first = relexio("convert", run.steps_path, "--base", run.base_path, "--steps", "10:30", "-o", out, "--json")
        assert first.code == 0 and json.loads(first.out)["out"] == str(out), first.err
        more = relexio("convert", run.steps_path, "-o", out, "--json")
        assert json.loads(more.out)["added"] == [40], more.err
        done = relexio("predict", out, "--method", "relex", "--step", 100, "-o", tmp_path / f"predicted-{out == url}")
        assert done.code == 0 and "not kept" not in done.err, done.err
    assert without_cache(bucket.objects("runs/grpo/run.zarr")) == without_cache(snapshot(here))
    assert snapshot(tmp_path / "predicted-True") == snapshot(tmp_path / "predicted-False")
    found, wanted = (json.loads(relexio("inspect", out, "--json").out) for out in (url, here))
    assert found.pop("path") == url and wanted.pop("path") == str(here)
    assert found["bytes"].pop("cache") > 0 and wanted["bytes"].pop("cache") > 0
    assert found == wanted


def test_plans_say_nothing_of_a_disk(run: Run, bucket: Bucket, tmp_path: Path, relexio: Relexio) -> None:
    command = ("convert", run.steps_path, "--base", run.base_path, "-o", bucket.url(), "--dry-run")
    plan = relexio(*command)
    assert plan.code == 0 and " at most" in plan.out and "free" not in plan.out
    assert json.loads(relexio(*command, "--json").out)["bytes_free"] is None
    assert bucket.objects() == {}


def test_python_api(run: Run, whole: Path, bucket: Bucket, tmp_path: Path) -> None:
    bucket.upload(whole)
    trajectory = package.open(bucket.url() + "/")
    assert trajectory.path == bucket.url() and trajectory.steps == (10, 20, 30, 40)
    trajectory.checkpoint(30).save(tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(run.steps_path / "global_step_30")
    with pytest.raises(RequestError, match="local directory"):
        trajectory.checkpoint(30).save(bucket.url("back"))
    store = pickle.loads(pickle.dumps(open_store(bucket.url())))  # noqa: S301
    assert store.steps == (10, 20, 30, 40) and len(store.file(store.base().side["config.json"])) > 0


def test_checkpoints_stay_on_local_disk(run: Run, stored: Path, bucket: Bucket, relexio: Relexio) -> None:
    bucket.upload(stored)
    for command in (
        ("predict", bucket.url(), "--method", "relex", "--step", 50, "-o", bucket.url("predicted")),
        ("convert", bucket.url("steps"), "-o", bucket.url()),
        ("convert", run.steps_path, "--base", bucket.url("base"), "-o", bucket.url("new")),
        ("convert", "--checkpoint", f"50={bucket.url('step')}", "-o", bucket.url()),
    ):
        done = relexio(*command)
        assert done.code == 1 and "local directory for checkpoints" in done.err
    assert bucket.objects("predicted") == bucket.objects("new") == {}


@pytest.mark.slow
def test_a_killed_conversion_is_taken_up(run: Run, whole: Path, bucket: Bucket, relexio: Relexio) -> None:
    """Killed in the middle, with lock and all: the next one sees that the owner is gone, and keeps what is whole."""
    script = """
import os, signal, sys
from relexio.verbs import convert as verb
from relexio.verbs.convert import write
real, done = write.encode_block, []
def dying(job, block):
    done.append(real(job, block))
    if len(done) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return done[-1]
write.encode_block = dying
from relexio.cli.main import main
main(sys.argv[1:])
"""
    command = ["convert", run.steps_path, "--base", run.base_path, "--workers", "1", "-o", bucket.url()]
    killed = subprocess.run([sys.executable, "-c", script, *map(str, command)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = bucket.objects()
    assert LOCK in left and json.loads(left[LOCK])["host"] == socket.gethostname()
    assert len([name for name in left if name.startswith("segments/0000/finished/")]) == 1
    with pytest.raises(StoreError, match="unfinished conversion; run the same relexio convert again"):
        open_store(bucket.url())
    done = relexio(*command, "--json")
    assert done.code == 0 and json.loads(done.out)["resumed"], done.err
    assert bucket.objects() == snapshot(whole)


@pytest.mark.parametrize("written", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_cut_off_after_any_object(
    run: Run, stored: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """The lock may be all there is, or the marker; whatever it is, the same command finishes it."""
    real, puts = s3fs.S3FileSystem._call_s3, 0

    async def failing(self: Any, method: str, *rest: Any, **more: Any) -> Any:
        nonlocal puts
        puts += method == "put_object"
        if puts > written and method == "put_object":
            raise ConnectionResetError("gone")
        return await real(self, method, *rest, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", failing)
    with pytest.raises(StorageError, match=r"run.zarr: gone; check .* the network"):
        store_run(run, bucket.url(), "10:20")
    monkeypatch.undo()
    assert len(bucket.objects()) == max(written - 1, 0), "the lock is given back"
    with pytest.raises((StoreError, MissingError), match="unfinished" if written > 1 else "no such trajectory"):
        open_store(bucket.url())
    store_run(run, bucket.url(), "10:20")
    assert bucket.objects() == snapshot(stored)


@pytest.mark.slow
def test_appending_is_taken_up(
    run: Run, stored: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relexio: Relexio
) -> None:
    bucket.upload(stored)
    before = bucket.objects()
    monkeypatch.setattr(merge, "commit", lambda *_: (_ for _ in ()).throw(StorageError("the network is gone")))
    with pytest.raises(StorageError):
        store_run(run, bucket.url(), base=False)
    monkeypatch.undo()
    assert open_store(bucket.url()).steps == (10, 20) and before.items() < bucket.objects().items()
    done = relexio("convert", run.steps_path, "-o", bucket.url(), "--json")
    assert json.loads(done.out)["resumed"], done.err
    store_run(run, shutil.copytree(stored, tmp_path / "run.zarr"), base=False)
    assert bucket.objects() == snapshot(tmp_path / "run.zarr")


def test_other_errors_leave_nothing(bucket: Bucket, tmp_path: Path, relexio: Relexio) -> None:
    run = make_run(tmp_path, steps=(1, 2))
    for tensors in run.steps.values():
        tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    run = Run(tmp_path, run.base, run.steps)
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", bucket.url())
    assert done.code == 1 and "NaN" in done.err
    assert bucket.objects() == {}


def test_what_is_no_trajectory_is_left_alone(run: Run, bucket: Bucket) -> None:
    bucket.put("run.zarr/notes.txt", b"of somebody")
    with pytest.raises(ExistsError, match="is not a trajectory"):
        store_run(run, bucket.url())
    with pytest.raises(StoreError, match="not a relexio trajectory"):
        open_store(bucket.url())
    assert bucket.objects() == {"notes.txt": b"of somebody"}


def test_a_store_that_appears_meanwhile_is_left_alone(run: Run, stored: Path, bucket: Bucket) -> None:
    late = prepare(Request(bucket.url(), run.base_path, run.steps_path), CPU, silent)
    bucket.upload(stored)
    before = bucket.objects()
    with pytest.raises(ExistsError, match="was created by something else meanwhile"):
        convert(late, silent)
    assert bucket.objects() == before


@pytest.mark.parametrize(
    ("host", "pid"), [("elsewhere", NOBODY), (None, os.getpid())], ids=["of another host", "of a live process"]
)
def test_a_second_writer_is_refused(
    run: Run, stored: Path, bucket: Bucket, relexio: Relexio, host: str | None, pid: int
) -> None:
    bucket.upload(stored)
    bucket.put(f"run.zarr/{LOCK}", lock_of(host or socket.gethostname(), pid))
    before = bucket.objects()
    done = relexio("convert", run.steps_path, "-o", bucket.url())
    assert done.code == 1 and f"process {pid} of ann on {host or socket.gethostname()}" in done.err
    assert f"remove the object {bucket.url()}/{LOCK}" in done.err.splitlines()[-1]
    assert bucket.objects() == before
    assert open_store(bucket.url()).steps == (10, 20), "readers need no lock"


def test_a_stale_lock_is_taken_over(bucket: Bucket) -> None:
    bucket.put(f"run.zarr/{LOCK}", lock_of(socket.gethostname(), NOBODY))
    with locate(bucket.url()).locked():
        assert json.loads(bucket.objects()[LOCK])["pid"] == os.getpid()
    assert bucket.objects() == {}


def test_a_lock_that_cannot_be_read_is_somebodys(run: Run, bucket: Bucket) -> None:
    bucket.put(f"run.zarr/{LOCK}", b"\xff not ours")
    with pytest.raises(BusyError, match="another process is writing it"):
        store_run(run, bucket.url())
    assert bucket.objects() == {LOCK: b"\xff not ours"}


def test_of_many_at_once_one_gets_the_lock(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have looked, and found no lock, before the first creates it: the storage decides."""
    threads = 4
    looked = threading.Barrier(threads)
    real = ObjectStorage._held
    monkeypatch.setattr(ObjectStorage, "_held", lambda self: (real(self), looked.wait())[0])
    tried, got, refused = threading.Barrier(threads), [], []

    def writer() -> None:
        try:
            with locate(bucket.url()).locked():
                got.append(1)
                tried.wait()
        except BusyError as error:
            refused.append(str(error))
            tried.wait()

    running = [threading.Thread(target=writer) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert (len(got), len(refused)) == (1, threads - 1) and bucket.objects() == {}


def test_a_lock_is_given_back_after_errors_and_only_by_its_owner(bucket: Bucket) -> None:
    with pytest.raises(KeyboardInterrupt), locate(bucket.url()).locked():
        raise KeyboardInterrupt
    assert bucket.objects() == {}
    with locate(bucket.url()).locked():
        bucket.put(f"run.zarr/{LOCK}", lock_of("elsewhere", 1))
    assert bucket.objects() == {LOCK: lock_of("elsewhere", 1)}


def test_a_kept_fit_is_used_again(stored: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.upload(stored)
    bucket.put("run.zarr/cache/gram-0000/zarr.json", b"of fewer steps")
    made = fit_run(open_store(bucket.url())).weights_for([100])
    with monkeypatch.context() as patch:
        patch.setattr("relexio.engine.graph.gram", lambda *_: pytest.fail("the fit is there already"))
        found = fit_run(open_store(bucket.url())).weights_for([100])
    assert all((made[name] == found[name]).all() for name in made)
    assert {name.split("/")[1] for name in bucket.objects() if name.startswith("cache/")} == {"gram-0002", "zarr.json"}


def test_a_half_written_fit_is_not_used(whole: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(bucket.upload(whole))
    real = ObjectStorage.put

    def put(location: ObjectStorage, key: str, data: bytes) -> None:
        if key == "zarr.json":
            raise StorageError("killed before the mark")
        real(location, key, data)

    monkeypatch.setattr(ObjectStorage, "put", put)
    with pytest.raises(StorageError):
        fit_run(store)
    monkeypatch.setattr(ObjectStorage, "put", real)
    begun = {name: data for name, data in bucket.objects().items() if name.startswith("cache/")}
    [chunk] = [name for name in begun if "/c/" in name]
    bucket.put(f"run.zarr/{chunk}", b"not a chunk")
    weights = fit_run(open_store(bucket.url())).weights_for([100])
    made = bucket.objects()
    assert made[chunk] == begun[chunk] and json.loads(made["cache/gram-0004/zarr.json"])["attributes"]["whole"] is True
    again = fit_run(open_store(bucket.url())).weights_for([100])
    assert all((weights[name] == again[name]).all() for name in weights)


@pytest.mark.slow
def test_a_store_that_may_only_be_read(
    run: Run, stored: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.upload(stored)
    before = bucket.objects()

    real = s3fs.S3FileSystem._call_s3

    async def refused(self: Any, method: str, *rest: Any, **more: Any) -> Any:
        if method == "put_object":
            raise PermissionError("Access Denied")
        return await real(self, method, *rest, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", refused)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of the temporary directory that goes with the fit
        fitted = fit_run(open_store(bucket.url()))
        assert fitted.notes == [f"{bucket.url()} cannot be written: the fit is not kept for later"]
        predict_run(fitted, 100, tmp_path / "out")
        del fitted
        gc.collect()
    with pytest.raises(StorageError, match="Access Denied; check the address, the credentials"):
        store_run(run, bucket.url(), base=False)
    assert bucket.objects() == before


def said_once(done: Any, *words: str) -> None:
    """One clean line, the exit code of an error."""
    assert done.code == 1 and done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err


def test_a_bucket_that_is_not_there(run: Run, relexio: Relexio) -> None:
    said_once(
        relexio("convert", run.steps_path, "--base", run.base_path, "-o", "s3://no-such/run.zarr"),
        "s3://no-such/run.zarr", "bucket does not exist",
    )  # fmt: skip
    said_once(relexio("inspect", "s3://no-such/run.zarr"), "s3://no-such/run.zarr: no such trajectory")


def test_no_credentials(bucket: Bucket, run: Run, relexio: Relexio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    forget()
    try:
        said_once(relexio("inspect", bucket.url()), f"{bucket.url()}: Unable to locate credentials; check")
        said_once(
            relexio("convert", run.steps_path, "--base", run.base_path, "-o", bucket.url()),
            "Unable to locate credentials",
        )
    finally:
        monkeypatch.undo()
        forget()


def test_an_endpoint_that_does_not_answer(
    bucket: Bucket, stored: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = open_store(bucket.upload(stored))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
    forget()
    try:
        said_once(
            relexio("predict", bucket.url(), "--method", "relex", "--step", 50, "-o", tmp_path / "out"),
            bucket.url(),
            "Could not connect",
        )
        with pytest.raises(StorageError, match="Could not connect"):  # in the middle of a pass, too
            store.base_bits(store.blocks[0])
    finally:
        monkeypatch.undo()
        forget()
    assert not (tmp_path / "out").exists()


def test_without_s3fs(relexio: Relexio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    said_once(relexio("inspect", "s3://any/run.zarr"), "s3://any/run.zarr", "pip install 'relexio[s3]'")


@pytest.mark.parametrize("address", ["nonsense://any/run.zarr", "s3://", "s3://any/run[1].zarr"])
def test_addresses_that_cannot_be(relexio: Relexio, address: str) -> None:
    said_once(relexio("inspect", address), address)


@pytest.mark.filterwarnings(
    # zarr's own wrapper for file systems without asyncio: nothing that relexio could do about it
    "ignore:fs .* was not created with `asynchronous=True`"
)
def test_any_other_file_system(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 256)
    url, here = "memory://runs/run.zarr", tmp_path / "run.zarr"
    for out in (url, here):
        store_run(run, out, "10:20")
        store_run(run, out, base=False)
        predict_run(fit_run(open_store(out)), 100, tmp_path / f"out-{out == url}")
    assert snapshot(tmp_path / "out-True") == snapshot(tmp_path / "out-False")
    with locate(url).locked(), pytest.raises(BusyError, match=f"process {os.getpid()}"), locate(url).locked():
        pass
    locate(url).remove()
    assert not locate(url).exists()
    with pytest.raises(MissingError):
        open_store(url)


@pytest.mark.parametrize("where", ["s3", "local"])
def test_single_objects(bucket: Bucket, tmp_path: Path, where: str) -> None:
    there = locate(bucket.url() if where == "s3" else tmp_path / "run.zarr")
    assert there.get("segments/0000/bf16/by/c/0") is None and there.names() == [] and there.nbytes() == 0
    there.make()
    there.put("segments/0000/bf16/by/c/0", b"old")
    there.put("segments/0000/bf16/by/c/0", bytes(range(256)))
    copied = pickle.loads(pickle.dumps(there))  # noqa: S301
    assert copied.get("segments/0000/bf16/by/c/0") == bytes(range(256))
    assert there.get("segments/0000") is None and there.get("segments/0000/bf16/by/c/0/0") is None
    assert (there.names(), there.below("segments").names(), there.nbytes()) == (["segments"], ["0000"], 256)
    there.below("segments/0000").remove()
    assert there.nbytes() == 0 and not there.below("segments/0000").exists()
    assert not list(tmp_path.rglob("*.partial"))
