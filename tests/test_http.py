"""A trajectory that a web server gives: read as from a disk, and never written."""

import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.command import Relexio, in_process, snapshot
from tests.support.make import Run, make_run
from tests.support.steps import store_run

pytest.importorskip("aiohttp")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = make_run(tmp_path / "run")
    store_run(made, tmp_path / "served" / "run.zarr")
    return made


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """The address of what is served, which is all below ``served``."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_it_is_predicted_swept_and_verified(run: Run, url: str, tmp_path: Path, relexio: Relexio) -> None:
    """In processes of their own, as the connections of one last as long as it does."""
    store, before = tmp_path / "served" / "run.zarr", snapshot(tmp_path / "served")
    ahead = in_process(
        "predict", f"{url}/run.zarr", "--method", "relex", "--step", 20, "-o", tmp_path / "there", "--dry-run"
    )
    assert ahead.code == 0 and re.search(r"to read +[1-9]", ahead.out), ahead.err
    sweep = ("--steps", 20, "--eval", "echo $RELEXIO_STEP # {checkpoint}", "-o", tmp_path / "swept")
    for command in (
        ("predict", f"{url}/run.zarr", "--method", "relex", "--step", 20, "-o", tmp_path / "there"),
        ("sweep", f"{url}/run.zarr", *sweep),
        ("verify", f"{url}/run.zarr"),
        ("inspect", f"{url}/run.zarr"),
    ):
        done = in_process(*command)
        assert done.code == 0, done.err
    assert snapshot(tmp_path / "served") == before
    assert relexio("predict", store, "--method", "relex", "--step", 20, "-o", tmp_path / "here").code == 0
    assert snapshot(tmp_path / "there") == snapshot(tmp_path / "here")


def test_it_cannot_be_written(run: Run, url: str, tmp_path: Path) -> None:
    before = snapshot(tmp_path / "served")
    done = in_process("convert", run.steps_path, "--base", run.base_path, "-o", f"{url}/new.zarr")
    assert done.code == 1 and done.err == f"error: {url}/new.zarr: can be read, not written; give another place\n"
    assert snapshot(tmp_path / "served") == before
