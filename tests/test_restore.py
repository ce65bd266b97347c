"""What comes back is what was committed, or nothing: parts of other stores and other places are told from a store's own."""

import random
import re
import shutil
from pathlib import Path

import pytest

import relexio
from relexio.errors import StoreError
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.verbs.restore import restore
from tests.support.command import Relexio, snapshot
from tests.support.make import Run, make_run, move
from tests.support.steps import CPU, small_blocks, store_run
from tests.support.tamper import rebind

Files = dict[str, bytes]


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Files, Files]:
    """A run, its store, and the store of a sibling from the same base."""
    small_blocks(monkeypatch, 256, 128)
    run = make_run(tmp_path, steps=(1, 2, 4))
    sibling = Run(tmp_path / "sibling", run.base, move(run.base, [1, 2, 4], seed=7))
    for made, out in ((run, "run.zarr"), (sibling, "other.zarr")):
        store_run(made, tmp_path / out, "1:2")
        store_run(made, tmp_path / out)
    monkeypatch.chdir(tmp_path)
    return run, snapshot(tmp_path / "run.zarr"), snapshot(tmp_path / "other.zarr")


def put(mixed: Files) -> None:
    for name, data in mixed.items():
        Path("run.zarr", name).write_bytes(data)


def test_parts_of_a_sibling_are_never_restored(stores: tuple[Run, Files, Files]) -> None:
    """As tools/attack/reliability.py --mixes does it for long: some chunks, all hashes too or not, and what a cut copy leaves."""
    run, ours, theirs = stores
    rng, refused = random.Random(0), 0
    chunks = [
        name for name in ours if name.startswith("segments/") and "bf16" in name and "/c/" in name and name in theirs
    ]
    blocks = [[name for name in chunks if f"/c/{i}" in name] for i in range(5)]
    cuts = [sorted(theirs)[: rng.randrange(1, len(theirs))] for _ in range(4)]
    for some in [*blocks, *(rng.sample(chunks, 3) for _ in range(5)), *cuts]:
        put({**ours, **{name: theirs[name] for name in some}})
        for step in run.steps:
            try:
                restore(open_store("run.zarr"), step, Path("out"), CPU, silent)
            except StoreError as error:
                assert "run.zarr" in str(error) and "\n" not in str(error)
                refused += 1
                assert not Path("out").exists() and not list(Path().glob("*partial"))
            else:
                assert snapshot(Path("out")) == snapshot(run.steps_path / f"global_step_{step}"), some
                shutil.rmtree("out")
        put(ours)
    assert refused >= 15


def test_the_error_names_step_and_tensor_and_what_to_do(stores: tuple[Run, Files, Files], relexio: Relexio) -> None:
    """Also of someone who made the hashes of chunks right: those of bits, and of whole steps, are asked too."""
    _, ours, theirs = stores
    own = [name for name in ours if name.startswith("segments/0001/bf16/") and name in theirs]
    put({name: theirs[name] for name in own if "digest" not in name})
    done = relexio("restore", "run.zarr", "--step", 4, "-o", "out")
    assert done.code == 1 and done.err.count("error:") == 1
    assert "chunk segments/0001/bf16/" in done.err and "it is not the one that was written there" in done.err
    rebind(Path("run.zarr"))
    done = relexio("restore", "run.zarr", "--step", 4, "-o", "out")
    assert done.code == 1 and done.err.count("error:") == 1
    for part in ("step 4", "model.embed_tokens.weight", "not the bits that were hashed", "relexio verify run.zarr"):
        assert part in done.err
    put({name: data for name, data in theirs.items() if re.match("segments/.*/bf16/", name)})  # digests too
    rebind(Path("run.zarr"))
    done = relexio("restore", "run.zarr", "--step", 4, "-o", "out")
    assert done.code == 1 and "step 4: its blocks are not those that were committed" in done.err, done.err


def test_the_base_is_compared_too(stores: tuple[Run, Files, Files], tmp_path: Path) -> None:
    _, ours, _ = stores
    put({"base/bf16/bits/c/0": ours["base/bf16/bits/c/1"]})
    for step in (None, 2):
        with pytest.raises(StoreError, match="chunk base/bf16/bits/c/0: damaged"):
            relexio.open("run.zarr").checkpoint(step).save(tmp_path / "out")
    rebind(Path("run.zarr"))
    for step in (None, 2):
        with pytest.raises(StoreError, match=r"model\.embed_tokens\.weight"):
            relexio.open("run.zarr").checkpoint(step).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_steps_are_not_added_to_a_base_that_is_another(stores: tuple[Run, Files, Files], relexio: Relexio) -> None:
    """Moves from other bits than the base's own would be worth nothing once the store is mended."""
    run, ours, _ = stores
    more = Run(run.root / "more", run.base, move(run.base, [9], seed=3))
    put({"base/bf16/bits/c/0": ours["base/bf16/bits/c/1"]})
    done = relexio("convert", more.steps_path, "-o", "run.zarr")
    assert done.code == 1 and "chunk base/bf16/bits/c/0: damaged" in done.err
    put(ours)
    assert snapshot(Path("run.zarr")) == ours, "nothing was left"
