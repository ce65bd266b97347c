"""Every chunk belongs to its place: one of another block, segment, store or time is refused, and named."""

import random
import shutil
from pathlib import Path

import pytest

from tests.support.command import Relexio, snapshot
from tests.support.make import BF16, Run, base_tensors, make_run, move
from tests.support.steps import small_blocks, store_run

Files = dict[str, bytes]
SHAPES = {"w": (50, 20), "norm": (9,), "v": (30, 30)}
PREDICT = ("predict", "run.zarr", "--method", "relex", "--step", 20, "-o", "out")


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Files]:
    """The files of a store, of a sibling's from the same base, of one with another base, and of the store as it was before."""
    small_blocks(monkeypatch, 256, 128)
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, steps=(1, 2, 4, 5), shapes=SHAPES)
    sibling = Run(tmp_path / "sibling", run.base, move(run.base, [1, 2, 4, 5], seed=7))
    base = base_tensors(BF16, seed=5, shapes=SHAPES)
    other = Run(tmp_path / "other", base, move(base, [1, 2, 4, 5], seed=8))
    found = {}
    for name, made in (("ours", run), ("sibling", sibling), ("other", other)):
        for steps in ("1:2", "4", "5"):
            store_run(made, tmp_path / f"{name}.zarr", steps)
        found[name] = snapshot(tmp_path / f"{name}.zarr")
    store_run(run, tmp_path / "before.zarr", "1:2")  # as before its last steps were taken back, and others added
    other_steps = Run(tmp_path / "again", run.base, move(run.base, [4, 5], seed=9))
    for steps in ("4", "5"):
        store_run(other_steps, tmp_path / "before.zarr", steps)
    found["before"] = snapshot(tmp_path / "before.zarr")
    shutil.copytree("ours.zarr", "run.zarr")
    return found


def refused(relexio: Relexio, ours: Files, changed: Files, want: bytes) -> None:
    """With other contents of some files, verify names one of them, and predict gives the same as ever, or nothing."""
    for name, data in changed.items():
        assert ours[name] != data, name
        Path("run.zarr", name).write_bytes(data)
    done = relexio("verify", "run.zarr")
    assert done.code == 1 and "Traceback" not in done.err, (list(changed), done)
    named = [part for name in changed for part in (name, name.split("/c/")[0])]
    assert any(part in done.err for part in named), (list(changed), done.err)
    made = relexio(*PREDICT)
    if made.code == 0:
        assert Path("out/model.safetensors").read_bytes() == want, list(changed)
        shutil.rmtree("out")
    else:
        assert made.err.count("error:") == 1 and not Path("out").exists(), made
    shutil.rmtree("run.zarr/cache", ignore_errors=True)  # or a kept fit would be right in spite of it
    for name in changed:
        Path("run.zarr", name).write_bytes(ours[name])


def kind_of(name: str) -> str:
    """The array that a chunk is of."""
    return name.split("/c/")[0].rsplit("/", 1)[-1]


@pytest.fixture
def want(stores: dict[str, Files], relexio: Relexio) -> bytes:
    assert relexio(*PREDICT).code == 0
    data = Path("out/model.safetensors").read_bytes()
    shutil.rmtree("out")
    shutil.rmtree("run.zarr/cache")
    return data


ARRAYS = ("when", "by", "bits", "digest", "index", "hashes", "changed")


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("source", ["sibling", "other", "before"])
def test_chunks_of_another_store(
    stores: dict[str, Files], relexio: Relexio, want: bytes, array: str, source: str
) -> None:
    """The same place in another store, or in what the store once was."""
    ours, theirs = stores["ours"], stores[source]
    names = [n for n in ours if "/c/" in n and kind_of(n) == array and n in theirs and ours[n] != theirs[n]]
    if array == "bits" and source != "other":
        assert not names, "one base"
        return
    assert names
    for name in random.Random(0).sample(names, min(4, len(names))):
        refused(relexio, ours, {name: theirs[name]}, want)
    refused(relexio, ours, {name: theirs[name] for name in names}, want)


@pytest.mark.parametrize("array", ARRAYS)
def test_chunks_that_changed_places(stores: dict[str, Files], relexio: Relexio, want: bytes, array: str) -> None:
    """Between blocks and segments of one store; both of a pair, and one of them."""
    ours = stores["ours"]
    names = [name for name in ours if "/c/" in name and kind_of(name) == array]
    pairs = [(a, b) for a in names for b in names if a < b and ours[a] != ours[b]]
    assert pairs or (array == "digest" and len(names) == 1)
    for one, other in random.Random(1).sample(pairs, min(6, len(pairs))):
        refused(relexio, ours, {one: ours[other]}, want)
        refused(relexio, ours, {one: ours[other], other: ours[one]}, want)


@pytest.mark.parametrize("source", ["sibling", "before"])
def test_whole_segments_of_another_store(stores: dict[str, Files], relexio: Relexio, want: bytes, source: str) -> None:
    """All files of a segment fit each other; they are not those that were committed."""
    ours, theirs = stores["ours"], stores[source]
    for top in ("segments/0001/", "segments/0002/bf16/", "segments/0002/"):
        names = [n for n in ours if n.startswith(top) and n in theirs and ours[n] != theirs[n]]
        refused(relexio, ours, {name: theirs[name] for name in names}, want)


def test_a_chunk_that_was_there_before_a_merge(
    tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, 256, 128)
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, steps=tuple(range(1, 9)), shapes=SHAPES)
    for step in range(1, 8):
        store_run(run, tmp_path / "run.zarr", str(step))
    before = snapshot(Path("run.zarr"))
    store_run(run, tmp_path / "run.zarr", "8")
    after = snapshot(Path("run.zarr"))
    assert relexio(*PREDICT).code == 0
    want = Path("out/model.safetensors").read_bytes()
    shutil.rmtree("out")
    shutil.rmtree("run.zarr/cache")
    for old, new in (("segments/0000/", "segments/0008/"), ("segments/0006/", "segments/0008/")):
        moved = {
            name.replace(old, new): data
            for name, data in before.items()
            if name.startswith(f"{old}bf16/") and "/c/" in name
        }
        changed = {name: data for name, data in moved.items() if name in after and after[name] != data}
        assert changed
        refused(relexio, after, changed, want)
