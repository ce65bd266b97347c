"""Steps added one at a time are what they are when added at once: segments are merged, and nothing is lost on the way."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.errors import StoreError
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.store.storage import locate
from relexio.store.store import Store
from relexio.verbs.convert import Request, convert, merge, prepare
from relexio.verbs.restore import restore
from relexio.verbs.verify import find_originals, verify
from relexio.words import parse_steps
from tests.support.command import Relexio, snapshot
from tests.support.make import Run, make_run
from tests.support.oracle import DTYPES
from tests.support.steps import CPU, fit_run, predict_run, small_blocks, store_run
from tests.support.striking import Killed, Strike, full, killed

SHAPES = {"model.embed_tokens.weight": (20, 24), "w": (33, 31), "model.norm.weight": (24,), "empty": (0, 7)}


def add(run: Run, out: Path, steps: list[int]) -> Store:
    """Add steps one at a time; the store at the end."""
    for step in steps:
        store = store_run(run, out, str(step))
    return store


def whole(store: Store, run: Run, steps: set[int]) -> None:
    """Everything verifies against its checkpoints, and nothing is left."""
    found = verify(store, find_originals(store, run.steps_path, run.base_path), CPU, silent)
    assert set(found.compared) == steps == set(store.steps)
    assert not found.problems and not [note for note in found.notes if "left by" in note], found


#: What runs each time; the other pairs are slow tests.
_QUICK = {("bfloat16", "gram"), ("float32", "blocks")}


@pytest.mark.parametrize(
    ("dtype", "solver"),
    [
        pytest.param(
            dtype,
            solver,
            marks=[] if (dtype.name, solver) in _QUICK else [pytest.mark.slow],
            id=f"{dtype.name}-{solver}",
        )
        for dtype in DTYPES
        for solver in ("gram", "blocks")
    ],
)
def test_one_at_a_time_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: np.dtype, solver: str
) -> None:
    """Of every prediction on the way, bit for bit, with segments of one step and merged ones side by side."""
    small_blocks(monkeypatch, 256, 128)
    run = make_run(tmp_path, dtype, steps=tuple(range(1, 21)), shapes=SHAPES)
    merged = set()
    for step in run.steps:
        store = store_run(run, tmp_path / "one.zarr", str(step))
        merged.add(tuple(segment.columns for segment in store.segments))
        if step in (7, 8, 9, 16, 20):
            once = store_run(run, tmp_path / f"{step}.zarr", f"1:{step}")
            assert len(once.segments) == 1 and once.contents == store.contents
            found = [
                snapshot(predict_run(fit_run(open_store(s.address), solver=solver), 60, tmp_path / f"{name}-{step}"))
                for name, s in (("one", store), ("once", once))
            ]
            assert found[0]["model.safetensors"] == found[1]["model.safetensors"]
    assert {(1,) * 7, (8,), (8, 1), (8, 8), (8, 8, 1, 1, 1, 1)} <= merged
    whole(store, run, set(run.steps))
    for step in (1, 8, 13, 20):
        restore(store, step, tmp_path / f"back-{step}", CPU, silent)
        assert snapshot(tmp_path / f"back-{step}") == snapshot(run.steps_path / f"global_step_{step}")


def test_steps_that_come_out_of_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain is in the order in which steps were added, whatever their numbers; so is a merged one."""
    small_blocks(monkeypatch, 256, 128)
    run = make_run(tmp_path, steps=tuple(range(1, 13)), shapes=SHAPES)
    order = [int(step) for step in np.random.default_rng(3).permutation(12) + 1]
    store = add(run, tmp_path / "run.zarr", order)
    assert tuple(store.chain) == tuple(order) and len(store.segments) < 12
    whole(store, run, set(run.steps))
    once = store_run(run, tmp_path / "once.zarr")
    for window in ("3,5,11", "1:12"):
        one, other = (
            predict_run(fit_run(s, window=window), 40, tmp_path / f"{s.next}-{window}") for s in (store, once)
        )
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("columns", "count"),
    [
        ([], 0),
        ([1] * 7, 0),
        ([1] * 8, 8),
        ([8, *[1] * 7], 0),
        ([8, *[1] * 8], 8),
        ([*[8] * 7, *[1] * 8], 8),
        ([*[8] * 8], 8),
        ([*[8] * 8, 1, 1], 10),
        ([64, *[8] * 7, 1], 0),
        ([64, *[8] * 8, 1], 9),
        ([3, 1, 7, 2, 5, 1, 1, 1], 8),
        ([1] * 9, 9),
        ([100, 1, 100, 1], 0),
    ],
)
def test_which_segments_are_merged(columns: list[int], count: int) -> None:
    assert merge.count_to_merge(columns) == count


def test_few_segments_and_few_rewrites() -> None:
    """Of a thousand steps added one at a time, there are never many segments, and each is rewritten a few times."""
    columns: list[int] = []
    rewritten = 0
    for _ in range(1000):
        columns.append(1)
        while count := merge.count_to_merge(columns):
            rewritten += sum(columns[-count:])
            columns[-count:] = [sum(columns[-count:])]
        assert len(columns) <= 7 * 4
    assert rewritten <= 4 * 1000


@pytest.fixture
def seven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Path]:
    """A run, and a store of its first seven steps: the next is followed by a merge."""
    small_blocks(monkeypatch, 512)
    run = make_run(tmp_path, steps=tuple(range(1, 10)), shapes={"w": (20, 17), "b": (300,)})
    add(run, tmp_path / "seven.zarr", list(range(1, 8)))
    return run, tmp_path / "seven.zarr"


def in_merges(patch: pytest.MonkeyPatch, number: int, failure: Callable[[str], BaseException]) -> Strike:
    """Fails the n-th write from when a merge is begun."""
    strike = Strike(patch, number, failure)

    def begin(*arguments: Any) -> Store:
        strike.begun = True
        return merge.merge(*arguments)

    patch.setattr("relexio.verbs.convert.write.merge", begin)
    return strike


def strikes(seven: tuple[Run, Path], failure: Callable[[str], BaseException]) -> Iterator[tuple[int, Path, Strike]]:
    """A copy of the store for every fifth write of a merge, and what makes that write fail; at last one that none fails."""
    _, store = seven
    number, last = -4, 1
    while number < last:
        number += 5
        out = store.with_name(f"{failure.__name__}-{number}.zarr")
        shutil.copytree(store, out)
        with pytest.MonkeyPatch.context() as patch:
            strike = in_merges(patch, number, failure)
            yield number, out, strike
            last = number + 1 if strike.struck else 0
        shutil.rmtree(out)


def test_a_merge_killed_at_any_write(seven: tuple[Run, Path]) -> None:
    """All steps are there, whether it was committed or not, and the same command again leaves what one that was not killed does."""
    run, store = seven
    want = store.with_name("want.zarr")
    shutil.copytree(store, want)
    store_run(run, want, "8")
    seen, struck = set(), 0
    for number, out, strike in strikes(seven, killed):
        with suppress(Killed):
            store_run(run, out, "8")
        if not strike.struck:
            continue
        struck, strike.begun = struck + 1, False
        left = open_store(out)
        seen.add(tuple(segment.columns for segment in left.segments))
        found = verify(left, find_originals(left, run.steps_path, run.base_path), CPU, silent)
        assert left.steps == tuple(range(1, 9)) == found.compared and not found.problems, (number, found)
        whole(store_run(run, out, "8"), run, set(range(1, 9)))
        assert open_store(out).contents == open_store(want).contents
        done = store_run(run, out, "9")
        assert [segment.columns for segment in done.segments] == [8, 1], number
        whole(done, run, set(range(1, 10)))
    assert seen == {(1,) * 8, (8,)}
    assert struck > 9


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_merge(seven: tuple[Run, Path]) -> None:
    """The steps are safe before it begins: it is no error, but it is said, and the next convert tries again."""
    run, _ = seven
    told = 0
    for number, out, strike in strikes(seven, full):
        request = Request(out, None, run.steps_path, {}, parse_steps("8"))
        done = convert(prepare(request, CPU, silent), silent)
        assert done.store.steps == tuple(range(1, 9)), number
        assert open_store(out).segments == done.store.segments
        if not strike.struck:
            continue
        strike.begun = False
        if len(done.store.segments) == 8:
            (note,) = (note for note in done.notes if "merged" in note)
            assert "the steps are stored" in note and "free space" in note and "tries again" in note
            told += 1
        assert not verify(done.store, find_originals(done.store, run.steps_path, None), CPU, silent).problems, number
        merged = store_run(run, out, "9")
        assert [segment.columns for segment in merged.segments] in ([9], [8, 1])
        whole(merged, run, set(range(1, 10)))
    assert told > 7


def test_the_command_line_says_that_nothing_was_merged(
    seven: tuple[Run, Path], relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = seven
    in_merges(monkeypatch, 3, full)
    done = relexio("convert", run.steps_path, "--steps", "8", "-o", store)
    assert done.code == 0 and "added       step 8" in done.out
    assert [line for line in done.err.splitlines() if line.startswith("note: the steps are stored, but ")], done.err


@pytest.mark.parametrize("what", ["predict", "restore", "verify"])
def test_a_reader_whose_segments_were_merged_meanwhile(seven: tuple[Run, Path], tmp_path: Path, what: str) -> None:
    """It is told what happened, and not that its store is damaged."""
    run, path = seven
    reader = open_store(path)
    store_run(run, path, "8")
    assert not (path / "segments" / "0000").exists()
    with pytest.raises(StoreError, match="was written to while it was read; run the command again"):
        if what == "verify":
            verify(reader, find_originals(reader, None, None), CPU, silent)
        elif what == "predict":
            predict_run(fit_run(reader), 60, tmp_path / "out")
        else:
            restore(reader, 3, tmp_path / "out", CPU, silent)
    assert not list(tmp_path.glob("out*"))
    predict_run(fit_run(open_store(path)), 60, tmp_path / "out")


def test_a_merge_needs_no_checkpoints(seven: tuple[Run, Path], tmp_path: Path) -> None:
    """Those of the other steps may be gone long since."""
    run, path = seven
    for step in range(1, 8):
        shutil.move(run.steps_path / f"global_step_{step}", tmp_path / f"away-{step}")
    store = store_run(run, path, "8")
    assert [segment.columns for segment in store.segments] == [8]
    for step in range(1, 8):
        shutil.move(tmp_path / f"away-{step}", run.steps_path / f"global_step_{step}")
    whole(store, run, set(range(1, 9)))


def test_what_was_not_stored_and_side_files_outlive_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 512)
    run = make_run(tmp_path, steps=tuple(range(1, 9)), shapes={"w": (20, 17)})
    for step in run.steps:
        (run.steps_path / f"global_step_{step}" / "tokenizer.json").write_text(f'"{step}"')
        (run.steps_path / f"global_step_{step}" / "optimizer.pt").write_bytes(bytes(step))
    store = add(run, tmp_path / "run.zarr", list(run.steps))
    assert len(store.segments) == 1
    for step in run.steps:
        record = store.record(step)
        assert store.file(record.side["tokenizer.json"]) == f'"{step}"'.encode()
        assert record.not_stored.files == {"optimizer.pt": step}
    assert len(list((tmp_path / "run.zarr" / "files").glob("*/"))) == 8 + 3, (
        "each once: tokenizers, config, header, base's"
    )
    assert locate(store.address).below("segments").names().count("0008") == 1
