"""``convert hf://ORG/NAME``: revisions of a repository, fetched one at a time by the Hub's own library from a Hub of our own."""

import subprocess
import sys
from pathlib import Path

import pytest

from relexio.errors import RequestError
from relexio.store.opening import open_store
from relexio.verbs.convert.hub import Repository
from tests.support.command import Outcome, Relexio
from tests.support.hub import hub
from tests.support.make import Run, make_run, save_checkpoint
from tests.support.steps import store_run

pytestmark = pytest.mark.hf
STEPS = (1, 2, 4)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    pytest.importorskip("huggingface_hub")
    return make_run(tmp_path / "made", steps=STEPS, shards=2)


def from_hub(address: str, run: Run, out: Path, *options: object, revisions: str = "step_{step}") -> Outcome:
    """The command, in a process that knows no other Hub."""
    command = ["convert", "hf://lab/model", "--revisions", revisions, "-o", out, "--base", run.base_path, *options]
    home = out.parent / "home"
    done = subprocess.run(
        [sys.executable, "-m", "relexio", *map(str, command)], capture_output=True, text=True, timeout=600,
        env={"HF_ENDPOINT": address, "HF_HOME": str(home), "PATH": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
             "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_revisions_are_fetched_one_at_a_time(run: Run, tmp_path: Path) -> None:
    revisions = {f"step_{step}": run.steps_path / f"global_step_{step}" for step in STEPS}
    with hub("lab/model", {"main": run.base_path, **revisions}) as (address, record):
        done = from_hub(address, run, tmp_path / "run.zarr", "--steps", "1:2")
        assert done.code == 0, done.err
        assert [line.split(":")[0] for line in done.err.splitlines() if "stored" in line] == [
            "step 1 stored",
            "step 2 stored",
        ]
        assert f"relexio backtest {tmp_path / 'run.zarr'}" in done.out
        record.failing.add("step_4")
        done = from_hub(address, run, tmp_path / "run.zarr")
        assert done.code == 1 and "Traceback" not in done.err
        assert done.err.splitlines()[-1].startswith("error: hf://lab/model, revision step_4: ")
        record.failing.clear()
        record.asked.clear()
        assert from_hub(address, run, tmp_path / "run.zarr").code == 0
        assert {name.split("/")[0] for name in record.asked} == {"step_4"}
        fetched = len(record.asked)
        done = from_hub(address, run, tmp_path / "run.zarr")
        assert done.code == 0 and "holds       steps 1, 2, 4\n" in done.out and len(record.asked) == fetched
    store, whole = open_store(tmp_path / "run.zarr"), store_run(run, tmp_path / "whole.zarr")
    assert store.contents == whole.contents
    assert store.record(4).source == "hf://lab/model@step_4"
    assert not [*tmp_path.glob("*.relexio-partial")]


def test_a_revision_in_fp32_is_rounded_and_compared(run: Run, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "fp32", {name: array.astype("f4") for name, array in run.steps[1].items()})
    with hub("lab/model", {"checkpoint-1": tmp_path / "fp32"}) as (address, _):
        done = from_hub(address, run, tmp_path / "run.zarr", revisions="checkpoint-{step}")
    assert done.code == 0 and "note: steps have F32" in done.err
    assert open_store(tmp_path / "run.zarr").contents[1] == store_run(run, tmp_path / "whole.zarr").contents[1]


def test_what_is_not_there_is_told(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    with hub("lab/model", {"main": run.base_path}) as (address, _):
        done = from_hub(address, run, tmp_path / "run.zarr")
        assert done.code == 1 and "no revision is called step_{step}; it has main" in done.err
    done = from_hub("http://127.0.0.1:9", run, tmp_path / "run.zarr")
    assert done.code == 1 and "run the same command again" in done.err and "Traceback" not in done.err
    for options in (["hf://lab/model"], [run.steps_path, "--revisions", "step_{step}"]):
        assert relexio("convert", *options, "-o", tmp_path / "run.zarr").code == 2
    with_hub = ("convert", "hf://lab/model", "--revisions", "step_{step}", "--base", run.base_path)
    for option in (["--dry-run"], ["--verify"], ["--follow"], ["--replace", "3:"], ["--checkpoint", f"3={tmp_path}"]):
        done = relexio(*with_hub, "-o", tmp_path / "run.zarr", *option)
        assert done.code == 2 and "goes without" in done.err
    for address, pattern in (("hf://model", "step_{step}"), ("hf://a/b/c", "{step}"), ("hf://lab/model", "step")):
        with pytest.raises(RequestError, match="write"):
            Repository.parse(address, pattern)
