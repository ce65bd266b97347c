"""What leaves this machine with a result: no path of it, and no password or signature that an address carried."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import relexio as package
from relexio.store.storage import locate
from relexio.store.storage.objects import ObjectStorage
from relexio.words import shown, stem, without_secrets
from tests.support.command import Outcome, Relexio, refused
from tests.support.make import Run, make_run

SECRET = "pa55w0rd"
URL = f"memory://user:{SECRET}@here/run.zarr"
SEEN = "memory://***@here/run.zarr"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"), steps=(10, 20, 30, 40), shapes={"model.norm.weight": (24,)})


@pytest.fixture
def at_url(run: Run, relexio: Relexio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A trajectory at an address with a password. Where the tests write."""
    monkeypatch.chdir(tmp_path)
    clean(relexio("convert", run.steps_path, "--base", run.base_path, "-o", URL))
    yield tmp_path
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def clean(done: Outcome, code: int = 0) -> str:
    """Everything that a command printed, once it is sure that the password is not in it."""
    said = done.out + done.err
    assert done.code == code and "Traceback" not in said, said
    assert SECRET not in said, said
    return said


def nothing_below(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert SECRET not in path.name
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("address", "seen"),
    [
        ("s3://key:secret@bucket/run.zarr", "s3://***@bucket/run.zarr"),
        ("s3://key:sec/r+et@bucket/run.zarr", "s3://***@bucket/run.zarr"),
        ("s3://key:my secret@bucket/run.zarr", "s3://***@bucket/run.zarr"),
        ("s3:/key:secret@bucket/run.zarr", "s3:/***@bucket/run.zarr"),
        ("memory:///key:secret@bucket/run.zarr", "memory:///***@bucket/run.zarr"),
        ("simplecache::s3://key:secret@bucket/run.zarr", "simplecache::s3://***@bucket/run.zarr"),
        ("https://user:secret@host:80/run.zarr?X-Amz-Signature=secret&b=1", "https://***@host:80/run.zarr?***"),
        ("https://secret@host/run.zarr", "https://***@host/run.zarr"),
        ("abfs://container@account.dfs/run.zarr", None),
        ("s3://bucket/a:b@c/run.zarr", None),
        ("http://host:8080/a@b/run.zarr", None),
        ("/data/a:b@c/run.zarr", None),
        ("run.zarr", None),
    ],
)
def test_what_is_shown_of_an_address(address: str, seen: str | None) -> None:
    assert shown(address) == (seen or address)
    assert without_secrets(f"{address}: nothing there", address) == f"{seen or address}: nothing there"
    if " " not in address:
        assert without_secrets(f"look at '{address}', please") == f"look at '{seen or address}', please"


@pytest.mark.parametrize("port", ["99999", "notaport"])
def test_an_address_without_a_right_port(relexio: Relexio, port: str) -> None:
    refused(relexio("inspect", f"http://me:secret@host:{port}/run.zarr"), "its port is not a number up to 65535")


def test_a_password_by_itself_and_percent_encoded() -> None:
    address = "https://me:my%20secret@host/run.zarr"
    said = without_secrets("bucket me:my%20secret, password 'my secret'; of me", address)
    assert said == "bucket ***, password '***'; of me"


def test_files_are_not_named_by_a_password() -> None:
    assert stem("s3://key:secret@bucket") == "bucket"
    assert stem("s3://bucket/run.zarr/") == stem("/data/run.zarr") == "run"


def test_commands_on_an_address_with_a_password(at_url: Path, run: Run, relexio: Relexio) -> None:
    convert = ["convert", run.steps_path, "--base", run.base_path, "-o", URL]
    assert SEEN in clean(relexio(*convert)) and SEEN in clean(relexio(*convert, "--json"))
    for command in ("inspect", "backtest", "findings"):
        assert SEEN in clean(relexio(command, URL))
        assert json.loads(relexio(command, URL, "--json").out)["path"] == SEEN
    assert SEEN in clean(relexio("verify", URL, run.steps_path))
    clean(relexio("predict", URL, "--method", "relex", "--step", 50, "-o", at_url / "out"))
    clean(relexio("restore", URL, "--step", 20, "-o", at_url / "step"))
    nothing_below(at_url)
    trajectory = package.open(URL)
    for held in (trajectory, trajectory._store, locate(URL)):
        assert SECRET not in repr(held) and "***" in repr(held)
    assert SECRET not in trajectory._repr_html_() and "***" in trajectory._repr_html_()


def test_a_sweep_on_an_address_with_a_password(at_url: Path, relexio: Relexio) -> None:
    clean(relexio("sweep", URL, "--steps", 50, "--eval", "echo 1 # {checkpoint}"))
    assert json.loads((at_url / "run.sweep" / "results.json").read_text())["trajectory"] == SEEN
    nothing_below(at_url)


def test_an_evaluation_at_an_address_with_a_password(at_url: Path, relexio: Relexio) -> None:
    def sweep(password: str, *more: str) -> str:
        command = f"true https://me:{password}@host/x?sig={password} {{checkpoint}}; echo 1"
        return clean(relexio("sweep", URL, "--steps", 50, "--eval", command, *more))

    assert "https://***@host/x?***" in sweep(SECRET, "--dry-run")
    sweep(SECRET)
    made = [path.read_bytes() for path in (at_url / "run.sweep").rglob("*") if path.is_file()]
    assert made and not any(SECRET.encode() in data for data in made)
    assert "already" in sweep("another", "--dry-run"), "the password has changed, the evaluation has not"


def test_a_leap_at_an_address_with_a_password(run: Run, relexio: Relexio, tmp_path: Path) -> None:
    """In what it is told to run: neither its tables, pages and logs nor what it prints has it."""
    address = f"true https://me:{SECRET}@host/x?sig={SECRET}"
    train = f"{address} {{base}}; cp -r '{run.steps_path}/global_step_10' {{out}}/checkpoint-10"
    judge = f"{address} {{checkpoint}}; echo 1"
    leap = ["leap", "--base", run.base_path, "--eval", judge, "--test", judge, "--segments", 1]
    for options in (["-o", tmp_path / "a"], ["-o", tmp_path / "a"], ["-o", tmp_path / "b", "--json"]):
        assert "https://***@host/x?***" in clean(relexio(*leap, *options, "--train", train))
    clean(relexio(*leap, "-o", tmp_path / "c", "--train", f"{address} {{base}} {{out}}; false"), 1)
    assert (tmp_path / "a" / "leap.html").exists()
    nothing_below(tmp_path)


def test_a_report_on_an_address_with_a_password(at_url: Path, relexio: Relexio) -> None:
    pytest.importorskip("altair")
    clean(relexio("report", URL))
    page = (at_url / "run.html").read_text(encoding="utf-8")
    assert f"Store: {SEEN}" in page and f"relexio report &#39;{SEEN}&#39;" in page
    nothing_below(at_url)


def files_at(url: str) -> tuple[Any, str]:
    """The file system of fsspec for an address, and the path in it."""
    location = locate(url)
    assert isinstance(location, ObjectStorage)
    return location._files()


def damaged_marker(files: Any, top: str) -> None:
    files.pipe_file(f"{top}/zarr.json", b"{}")


def damaged_array(files: Any, top: str) -> None:
    files.rm_file(next(name for name in files.find(top) if name.endswith("bits/zarr.json")))


def damaged_chunk(files: Any, top: str) -> None:
    files.pipe_file(next(name for name in files.find(top) if "/by/c/" in name), b"no chunk")


def all_gone(files: Any, top: str) -> None:
    files.rm(top, recursive=True)


def a_writer(files: Any, top: str) -> None:
    files.pipe_file(f"{top}/.relexio-lock", b"{}")


@pytest.mark.parametrize("fault", [damaged_marker, damaged_array, damaged_chunk, all_gone])
def test_errors_about_an_address_with_a_password(at_url: Path, relexio: Relexio, fault: Any) -> None:
    fault(*files_at(URL))
    assert "***@here/run.zarr" in clean(
        relexio("predict", URL, "--method", "relex", "--step", 50, "-o", at_url / "out"), 1
    )
    clean(relexio("verify", URL), 1)


def test_a_lock_at_an_address_with_a_password(
    at_url: Path, run: Run, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relexio.store.storage.objects._owner_has_ended", lambda held: False)
    files, top = files_at("memory://user:pa55w0rd@here/new.zarr")
    a_writer(files, top)
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", URL.replace("run", "new"))
    assert "remove the object memory://***@here/new.zarr/.relexio-lock" in clean(done, 1)


@pytest.mark.parametrize("error", [PermissionError, OSError])
def test_storage_that_tells_the_password(
    at_url: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    """As botocore does: it takes all before the first slash for the name of the bucket, and complains of it."""

    def cat_file(*_: object, **__: object) -> bytes:
        raise error(f'Invalid bucket name "user:{SECRET}@here", password {SECRET}')

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    assert 'Invalid bucket name "***@here", password ***' in clean(relexio("inspect", URL), 1)


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", f"nonsense://user:{SECRET}@here/run.zarr"],
        ["inspect", f"s3://user:{SECRET}@here/run[1].zarr"],
        ["convert", f"s3://user:{SECRET}@here/steps", "-o", "run.zarr"],
        ["convert", "steps", "-o", f"s3://user:{SECRET}@here/run.zarr.relexio-partial"],
        ["verify", URL, f"s3://user:{SECRET}@here/steps"],
        ["predict", URL, "--method", "relex", "--step", "50", "-o", f"s3://user:{SECRET}@here/out"],
        ["report", URL, "-o", f"s3://user:{SECRET}@here/out"],
        ["inspect", URL, "--scheduler", f"tcp://user:{SECRET}@here"],
    ],
    ids=lambda command: " ".join(command[:1]),
)
def test_addresses_that_are_refused(at_url: Path, relexio: Relexio, command: list[str]) -> None:
    assert "***@here" in clean(relexio(*command), 1)


def test_wrong_usage(relexio: Relexio) -> None:
    done = relexio("convert", "--checkpoint", f"s3://user:{SECRET}@here/step", "-o", "run.zarr")
    assert "***@here" in clean(done, 2)


def test_predictions_carry_no_path(run: Run, relexio: Relexio, tmp_path: Path) -> None:
    store, out = tmp_path / "run.zarr", tmp_path / "out"
    clean(relexio("convert", run.steps_path, "--base", run.base_path, "-o", store))
    done = relexio("predict", store, "--method", "relex", "--step", 50, "-o", out, "--json")
    facts = json.loads((out / "relexio.json").read_text())
    assert facts["base"] == {"model": "base", "content": package.open(store)._store.base_content}
    assert json.loads(done.out)["base"] == facts["base"]
    clean(relexio("sweep", store, "--steps", 60, "--eval", "echo 1 # {checkpoint}"))
    published = [*out.rglob("*"), *(tmp_path / "run.sweep" / "best").rglob("*")]
    assert len(published) > 8
    for path in published:
        assert not path.is_file() or str(run.root).encode() not in path.read_bytes(), path
