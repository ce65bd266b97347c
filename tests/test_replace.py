"""Steps that were written again take the place of the stored ones, in one commit, and leave nothing of the old."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from relexio.errors import StorageError
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.store.store import Store
from relexio.verbs.convert import Request, convert, prepare
from relexio.verbs.verify import find_originals, verify
from relexio.words import parse_steps
from tests.support.command import Relexio, snapshot
from tests.support.make import Run, make_run, save_checkpoint
from tests.support.steps import CPU, fit_run, predict_run, small_blocks, store_run
from tests.support.striking import Killed, Strike, full, killed

SHAPES = {"w": (33, 31), "norm": (24,), "v": (20, 20)}


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 256, 128)


def again(run: Run, *steps: int, seed: int = 9) -> None:
    """Training was resumed: these steps are others now."""
    other = make_run(run.root / f"again-{seed}", steps=steps, seed=seed, shapes=SHAPES)
    for step in steps:
        path = run.steps_path / f"global_step_{step}"
        shutil.rmtree(path)
        save_checkpoint(path, other.steps[step], side={"tokenizer.json": f'"{seed}"'})


def replace(run: Run, out: Path, which: str, steps: str | None = None) -> Store:
    request = Request(out, None, run.steps_path, {}, parse_steps(steps) if steps else None, parse_steps(which))
    return convert(prepare(request, CPU, silent), silent).store


def whole(store: Store, run: Run, steps: set[int]) -> None:
    found = verify(store, find_originals(store, run.steps_path, run.base_path), CPU, silent)
    assert set(store.steps) == steps == set(found.compared)
    assert not found.problems and not [note for note in found.notes if "left by" in note], found


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_any_steps_of_any_chain(tmp_path: Path, seed: int) -> None:
    """Whatever segments they are in, first, last or between, and in whatever order they were added."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 13))
    run, out = make_run(tmp_path, steps=tuple(range(1, count + 1)), shapes=SHAPES), tmp_path / "run.zarr"
    order = rng.permutation(count) + 1 if seed % 2 else np.arange(count) + 1
    for part in np.array_split(order, int(rng.integers(1, count + 1))):
        store_run(run, out, ",".join(map(str, part)))
    for number in range(3):
        chosen = sorted(int(s) for s in rng.choice(count, int(rng.integers(1, count + 1)), replace=False) + 1)
        again(run, *chosen, seed=100 * number + 50 + seed)
        store = replace(run, out, ",".join(map(str, chosen)))
        whole(store, run, set(run.steps))
    once = store_run(run, tmp_path / "once.zarr")
    found = [predict_run(fit_run(s), 40, tmp_path / name) for s, name in ((open_store(out), "one"), (once, "other"))]
    assert (found[0] / "model.safetensors").read_bytes() == (found[1] / "model.safetensors").read_bytes()


def test_steps_that_have_no_successor_go(tmp_path: Path) -> None:
    """After a resume from step 3 there are no steps 5 and 6 yet: the old ones are of another run."""
    run, out = make_run(tmp_path, steps=(1, 2, 3, 4, 5, 6), shapes=SHAPES), tmp_path / "run.zarr"
    store_run(run, out, "1:3")
    store_run(run, out)
    again(run, 4)
    for step in (5, 6):
        shutil.rmtree(run.steps_path / f"global_step_{step}")
    store = replace(run, out, "4:")
    whole(store, run, {1, 2, 3, 4})
    files = {name for name in store.metadata if name.startswith("files/")}
    assert {f"files/{p.name}" for p in (out / "files").glob("*/")} == files - {"files"}


def test_a_fit_of_the_old_steps_is_not_used(tmp_path: Path, relexio: Relexio) -> None:
    run, out = make_run(tmp_path, steps=(1, 2, 3, 4), shapes=SHAPES), tmp_path / "run.zarr"
    predict_run(fit_run(store_run(run, out)), 20, tmp_path / "old")
    again(run, 3, 4)
    assert relexio("convert", run.steps_path, "-o", out, "--replace", "3:").code == 0
    assert relexio("predict", out, "--method", "relex", "--step", 20, "-o", tmp_path / "new").code == 0
    predict_run(fit_run(store_run(run, tmp_path / "fresh.zarr")), 20, tmp_path / "fresh")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("old", "new", "fresh")]
    assert weights[1] == weights[2] != weights[0]
    assert relexio("verify", out, run.steps_path).code == 0


@pytest.mark.parametrize(
    ("which", "says"),
    [("9", "no such step is stored"), ("3", "no checkpoint of such a step"), ("2:3", ""), ("x", "--replace")],
)
def test_what_cannot_be_replaced(tmp_path: Path, relexio: Relexio, which: str, says: str) -> None:
    run, out = make_run(tmp_path, steps=(1, 2, 3), shapes=SHAPES), tmp_path / "run.zarr"
    store_run(run, out)
    before = snapshot(out)
    shutil.rmtree(run.steps_path / "global_step_3")
    done = relexio("convert", run.steps_path, "-o", out, "--replace", which)
    if not says:
        assert done.code == 0 and open_store(out).steps == (1, 2), "step 3 has no successor"
        return
    assert done.code in (1, 2) and says in done.err and "Traceback" not in done.err
    assert snapshot(out) == before


@pytest.mark.parametrize("nan", [True, False])
def test_a_new_step_that_is_bad_costs_nothing(tmp_path: Path, relexio: Relexio, nan: bool) -> None:
    """The old ones stay until the new ones are whole."""
    run, out = make_run(tmp_path, steps=(1, 2, 3), shapes=SHAPES), tmp_path / "run.zarr"
    store_run(run, out)
    before, path = snapshot(out), run.steps_path / "global_step_2"
    other = {name: array.copy() for name, array in run.steps[2].items()}
    if nan:
        other["norm"][3] = np.nan
    else:
        other.pop("norm")
    save_checkpoint(path, other)
    done = relexio("convert", run.steps_path, "-o", out, "--replace", "2")
    assert done.code == 1 and "step 2" in done.err.replace("global_step_2", "step 2"), done
    assert snapshot(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("failure", [killed, full])
def test_a_replacement_killed_at_any_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[[str], BaseException]
) -> None:
    """All old steps are there, or all new ones; the same command again ends with the new, and nothing is left."""
    small_blocks(monkeypatch, 4096)
    run, first = make_run(tmp_path, steps=(1, 2, 3, 4), shapes=SHAPES), tmp_path / "first.zarr"
    for steps in ("1:2", "3", "4"):
        store_run(run, first, steps)
    old = open_store(first).contents
    shutil.copytree(run.steps_path, tmp_path / "old")
    again(run, 2, 3)
    new = replace(run, shutil.copytree(first, tmp_path / "new.zarr"), "2:3").contents
    assert new != old and new[4] == old[4]
    seen, number = [], 1
    while True:
        out = shutil.copytree(first, tmp_path / f"{number}.zarr")
        with pytest.MonkeyPatch.context() as patch:
            strike = Strike(patch, number, failure)
            strike.begun = True
            with suppress(Killed, StorageError):
                replace(run, out, "2:3")
            strike.begun = False
        if not strike.struck:
            break
        left = open_store(out)
        seen.append(left.contents)
        assert left.contents in (old, new), number
        originals = tmp_path / "old" if left.contents == old else run.steps_path
        assert not verify(left, find_originals(left, originals, None), CPU, silent).problems, number
        whole(replace(run, out, "2:3"), run, {1, 2, 3, 4})
        shutil.rmtree(out)
        number += 4
    assert old in seen and number > 40


def test_a_new_step_that_is_not_complete_replaces_nothing(tmp_path: Path, relexio: Relexio) -> None:
    run, store = make_run(tmp_path, steps=(1, 2, 3), shapes=SHAPES), tmp_path / "run.zarr"
    assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", store).code == 0
    weights = run.steps_path / f"global_step_{max(run.steps)}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    before = snapshot(store)
    done = relexio("convert", run.steps_path, "-o", store, "--replace", max(run.steps))
    assert done.code == 1 and "nothing was replaced" in done.err and "replaced  " not in done.out, done
    assert snapshot(store) == before
