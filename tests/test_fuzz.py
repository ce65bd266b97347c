"""Hostile input comes to one RelexioError: every input that ever did otherwise, and what hypothesis thinks of."""

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relexio.checkpoints.layout import model_directory, open_checkpoint
from relexio.errors import CheckpointError, StoreError
from relexio.store.storage import locate
from tests.support.command import Relexio
from tests.support.make import Run, make_run, save_checkpoint

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "tests" / "corpus"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
SOME = settings(FEW, max_examples=3)


def _load() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools" / "attack"))
    try:
        spec = importlib.util.spec_from_file_location("fuzz", ROOT / "tools" / "attack" / "fuzz.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    return _load()


@pytest.fixture(scope="module")
def world(fuzz: ModuleType) -> Iterator[Any]:
    before = signal.signal(signal.SIGALRM, fuzz._hung)
    with fuzz.World() as made:
        yield made
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", sorted(path.name for path in CORPUS.iterdir()))
def test_the_corpus_comes_to_nothing(fuzz: ModuleType, world: Any, name: str) -> None:
    files = sorted((CORPUS / name).iterdir())
    wrong = {file.name: fuzz.attempt(fuzz.TARGETS[name], world, file.read_bytes()) for file in files}
    assert files and not {file: said for file, said in wrong.items() if said}


def test_every_target_has_a_corpus(fuzz: ModuleType) -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(fuzz.TARGETS)
    assert sum(file.stat().st_size for file in CORPUS.rglob("*") if file.is_file()) < 100_000


@pytest.mark.parametrize("name", ["header", "index", "side", "torch", "steps", "size", "cli"])
def test_any_bytes(fuzz: ModuleType, world: Any, name: str) -> None:
    seeds = fuzz.good_seeds(world, name)

    @FEW
    @given(st.data())
    def run(data: st.DataObject) -> None:
        some = data.draw(st.binary() | JSON.map(_dumped) | st.text().map(_encoded) | _spliced(seeds))
        assert fuzz.attempt(fuzz.TARGETS[name], world, some) is None

    run()


@pytest.mark.parametrize("name", ["marker", "metadata", "chunk", "moves", "kept"])
def test_any_store(fuzz: ModuleType, world: Any, name: str) -> None:
    seeds = fuzz.good_seeds(world, name)

    @SOME
    @given(st.data())
    def run(data: st.DataObject) -> None:
        some = data.draw(st.sampled_from(seeds).flatmap(lambda seed: st.integers(0, 2**32).map(lambda n: (seed, n))))
        mutated = fuzz.mutate(some[0], fuzz.random.Random(some[1]))
        assert fuzz.attempt(fuzz.TARGETS[name], world, mutated) is None

    run()


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _spliced(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """A good input with some bytes of it replaced."""
    parts = st.tuples(st.sampled_from(seeds), st.integers(0, 200), st.integers(0, 9), st.binary(max_size=9))
    return parts.map(lambda p: p[0][: p[1]] + p[3] + p[0][p[1] + p[2] :])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path, steps=(1, 2, 3))


OPTIONS = ["--steps", "--memory", "--checkpoint", "--scheduler", "--workers"]


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_convert(run: Run, relexio: Relexio, option: str) -> None:
    _any_text(relexio, ["convert", "steps", "--base", "base", "-o", "new", "--dry-run", option])


@pytest.mark.parametrize("option", ["--step", "--window", "--memory", "--strength", "--rank", "-o", "--solver"])
def test_options_of_predict(run: Run, relexio: Relexio, option: str) -> None:
    assert relexio("convert", "steps", "--base", "base", "-o", "run.zarr").code == 0
    step = [] if option == "--step" else ["--step", "9"]
    _any_text(relexio, ["predict", "run.zarr", "-o", "new", "--method", "relex", *step, "--dry-run", option])
    if option == "--step":
        _any_text(relexio, ["restore", "run.zarr", "-o", "new", "--step"])


def _any_text(relexio: Relexio, command: list[str]) -> None:
    alphabet = st.characters(exclude_characters="\0", exclude_categories=["Cs"])  # what a shell can give
    digits = st.text("0123456789:,.=GMiB-e ", max_size=24)

    @settings(FEW, max_examples=25)
    @given((st.text(alphabet, max_size=300) | digits).filter(lambda text: "://" not in text))
    def run(text: str) -> None:
        done = relexio(*command, text)
        assert done.code in (0, 1, 2), done
        assert "Traceback" not in done.err
        said = [line for line in done.err.splitlines() if line[:6].lower() == "error:"]
        assert len(said) == (done.code != 0) and (done.code == 0 or "\x1b" not in said[0]), done

    run()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_special_files_are_not_waited_for(tmp_path: Path, run: Run, relexio: Relexio, name: str) -> None:
    (run.base_path / name).unlink(missing_ok=True)
    os.mkfifo(run.base_path / name)
    done = relexio("convert", "steps", "--base", "base", "-o", "new")
    assert done.code == (name == "model.safetensors") and done.err.count("error:") == done.code


def test_an_index_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    made = save_checkpoint(tmp_path / "c", make_run(tmp_path).base, shards=2)
    index = made / "model.safetensors.index.json"
    index.rename(tmp_path / "secret.json")
    index.symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="a link to"):
        open_checkpoint(made)


def test_a_directory_inside_a_step_may_not_lead_out_of_it(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "huggingface").symlink_to(made.base_path)
    with pytest.raises(CheckpointError, match="a link that leads out of its step"):
        model_directory(tmp_path / "step")


def test_blobs_that_are_a_link_are_no_way_out(tmp_path: Path) -> None:
    """The Hub's cache is imitated, with its ``blobs`` elsewhere."""
    made = make_run(tmp_path / "run")
    snapshot = tmp_path / "hub" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").symlink_to(made.base_path)
    (snapshot / "model.safetensors").symlink_to("../../blobs/model.safetensors")
    with pytest.raises(CheckpointError, match="a link to"):
        open_checkpoint(snapshot)


def test_files_of_a_store_that_are_pipes_devices_or_vast(tmp_path: Path) -> None:
    here = locate(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with open(tmp_path / "vast", "wb") as file:
        file.truncate(1 << 40)
    assert here.get("pipe") is None and here.get("zero") is None
    with pytest.raises(StoreError, match="too many"):
        here.get("vast")


@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
def test_a_cache_that_is_a_link_is_not_written_to(tmp_path: Path, run: Run, relexio: Relexio) -> None:
    assert relexio("convert", "steps", "--base", "base", "-o", "run.zarr").code == 0
    (tmp_path / "elsewhere" / "gram-0000").mkdir(parents=True)
    (tmp_path / "run.zarr" / "cache").symlink_to(tmp_path / "elsewhere")
    done = relexio("predict", "run.zarr", "--method", "relex", "--step", "9", "-o", "out")
    assert done.code == 0 and "not kept" in done.err
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["gram-0000"]


def test_names_in_the_cache_that_nobody_wrote(tmp_path: Path, run: Run, relexio: Relexio) -> None:
    assert relexio("convert", "steps", "--base", "base", "-o", "run.zarr").code == 0
    for name in ("gram", "gramophone", "gram-", "gram-x-y"):
        (tmp_path / "run.zarr" / "cache" / name).mkdir(parents=True)
    assert relexio("predict", "run.zarr", "--method", "relex", "--step", "9", "-o", "out").code == 0
