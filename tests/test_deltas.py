"""Delta chains as input: the stored steps are the models whose chains slime, miles and SkyRL wrote (tests/deltas)."""

import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from relexio.checkpoints import chain as chains
from relexio.checkpoints.chain import Chain
from relexio.checkpoints.delta import Delta
from relexio.checkpoints.layout import find_steps, open_checkpoint
from relexio.checkpoints.protocol import Checkpoint
from relexio.checkpoints.whole import Watch, weight_stamps
from relexio.engine.resources import Resources
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.store.store import Store
from relexio.verbs.convert import Request, convert, follow, prepare
from relexio.verbs.restore import restore
from relexio.verbs.verify import find_originals, verify
from tests.support.adapters import back, same, whole
from tests.support.command import Relexio
from tests.support.deltas import CHAINS, LEFT, STILL, VERSIONS, model, unpack
from tests.support.make import load_checkpoint, save_checkpoint
from tests.support.steps import CPU, small_blocks

CASES = [case for case in CHAINS if case != "miles-overwrite"]  # whose checksums, blake3, take a package


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """All chains, and their base beside them."""
    save_checkpoint(tmp_path / "base", model(0))
    return unpack(tmp_path)


def version(runs: Path, case: str, number: int) -> Path:
    return runs / case / CHAINS[case].format(number)


def store_chain(runs: Path, out: Path, case: str, base: bool = True, resources: Resources = CPU) -> Store:
    request = Request(out, runs / "base" if base else None, runs / case)
    return convert(prepare(request, resources, silent), silent).store


def models(runs: Path, case: str, base: Checkpoint) -> dict[int, Checkpoint]:
    return {step: open_checkpoint(path, step).over(base) for step, path in find_steps(runs / case)[0].items()}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_model_that_was_published(runs: Path, case: str) -> None:
    """Versions in any order, and each alone, as in another process."""
    found = models(runs, case, open_checkpoint(runs / "base"))
    assert list(found) == list(VERSIONS)
    for step in (5, 1, 4, 2, 3, 5):
        same(whole(found[step]), model(step))
    for step in VERSIONS:
        alone = open_checkpoint(version(runs, case, step), step).over(open_checkpoint(runs / "base"))
        same(whole(alone), model(step))
    for one in pickle.loads(pickle.dumps(list(found.values()))):  # noqa: S301
        same(whole(one), model(one.step or 0))


def test_blake3_takes_a_package(runs: Path) -> None:
    found = models(runs, "miles-overwrite", open_checkpoint(runs / "base"))
    try:
        import blake3  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"step 1 \(.*\): its checksums are blake3: pip install blake3"):
            whole(found[1])
    else:
        for step in VERSIONS:
            same(whole(found[step]), model(step))


@pytest.mark.parametrize("case", CASES)
def test_any_split_of_a_read_gives_the_same_bits(runs: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "_PART", 48)
    found, rng = models(runs, case, open_checkpoint(runs / "base")), np.random.default_rng(3)
    for name, array in model(0).items():
        cuts = [0, *sorted(rng.integers(0, array.nbytes, 7)), array.nbytes]
        for first, last in pairwise(map(int, cuts)):
            for step in (*VERSIONS, 2):
                out = bytearray(last - first)
                with found[step].held(name, first, last - first) as read:
                    read(first, memoryview(out))
                assert out == model(step)[name].tobytes()[first:last], (name, first, step)


@pytest.mark.parametrize("case", CASES)
def test_the_content_is_that_of_whole_checkpoints(runs: Path, tmp_path: Path, case: str) -> None:
    for step in VERSIONS:
        save_checkpoint(tmp_path / "whole" / f"step_{step}", model(step))
    plain = store_chain(tmp_path, tmp_path / "plain.zarr", "whole")
    chain = store_chain(runs, tmp_path / "chain.zarr", case)
    assert chain.contents == plain.contents and chain.base_content == plain.base_content


@pytest.mark.parametrize("scheduler", [None, "processes"])
def test_neither_blocks_nor_workers_change_the_bits(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str | None
) -> None:
    small_blocks(monkeypatch, 64, 64)
    monkeypatch.setattr(chains, "_PART", 100)
    with Resources(workers=2, device="cpu", scheduler=scheduler) as resources:
        stored = store_chain(runs, tmp_path / "run.zarr", "slime-xor", resources=resources)
    for step in VERSIONS:
        same(back(stored, step, tmp_path / f"back-{step}"), model(step))


def _noting(read: list[tuple[int, str]]) -> Callable[..., bytes]:
    """``Delta.frame``, which notes what is unpacked: version and tensor."""
    frame = Delta.frame

    def note(delta: Delta, name: str, nbytes: int | None = None) -> bytes:
        read.extend([(delta.version, name)] if nbytes is None else [])
        return frame(delta, name, nbytes)

    return note


def test_each_patch_is_unpacked_once(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks, steps and ranges there are."""
    small_blocks(monkeypatch, 64, 64)
    unpacked: list[tuple[int, str]] = []
    applied: list[int] = []
    apply = chains._Spool.apply

    def applying(spool: chains._Spool, place: int, first: int, out: memoryview) -> None:
        applied.append(len(out))
        apply(spool, place, first, out)

    monkeypatch.setattr(Delta, "frame", _noting(unpacked))
    conversion = prepare(Request(tmp_path / "run.zarr", runs / "base", runs / "slime-xor"), CPU, silent)
    monkeypatch.setattr(chains._Spool, "apply", applying)
    convert(conversion, silent)
    assert len(unpacked) == len(set(unpacked)) == 4 * 5 - 1
    model_bytes = sum(array.nbytes for array in model(0).values())
    assert sum(applied) <= 5 * model_bytes  # not 1 + 2 + 3 + 4 + 5 times


def test_a_step_that_is_added_goes_on_from_the_store(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, later = tmp_path / "run.zarr", tmp_path / "later"
    for number in (4, 5):
        shutil.move(version(runs, "slime-xor", number), later / str(number))
    store_chain(runs, out, "slime-xor")
    for number in (4, 5):
        shutil.move(later / str(number), version(runs, "slime-xor", number))
        read: list[tuple[int, str]] = []
        with monkeypatch.context() as patched:
            patched.setattr(Delta, "frame", _noting(read))
            stored = store_chain(runs, out, "slime-xor", base=False)
        assert {version for version, _ in read} == {number}
    for step in VERSIONS:
        same(back(stored, step, tmp_path / f"back-{step}"), model(step))
    assert set(stored.record(5).side) == set(stored.record(1).side) == {"config.json", "tokenizer.json"}


def test_a_chain_goes_on_from_a_whole_model(runs: Path, tmp_path: Path) -> None:
    """slime: what lies before a whole version may be removed. The others need nothing either."""
    for number in (1, 2, 3):
        shutil.rmtree(version(runs, "slime-xor", number))
    save_checkpoint(version(runs, "slime-xor", 3), model(3), shards=2)  # as --update-weight-mode full writes it
    stored = store_chain(runs, tmp_path / "run.zarr", "slime-xor")
    assert stored.steps == (3, 4, 5)
    for step in stored.steps:
        restore(stored, step, tmp_path / f"back-{step}", CPU, silent)
        found = load_checkpoint(tmp_path / f"back-{step}")
        same({name: found[name] for name in model(step)}, model(step))
    shutil.copytree(version(runs, "miles-xor", 1), version(runs, "slime-xor", 1))
    shutil.copytree(version(runs, "miles-xor", 2), version(runs, "slime-xor", 2))
    read = models(runs, "slime-xor", open_checkpoint(runs / "base"))
    for step in (5, 2, 1, 4):
        same(whole(read[step]), model(step))


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_through_every_verb(runs: Path, tmp_path: Path, relexio: Relexio, case: str) -> None:
    out = tmp_path / "run.zarr"
    done = relexio("convert", runs / case, "--base", runs / "base", "-o", out, "--steps", "2::2", "--verify")
    assert done.code == 0, done.err
    done = relexio("convert", runs / case, "-o", out)
    assert done.code == 0, done.err
    assert f"step {STILL} is bit for bit the same as step {STILL - 1}" in done.out + done.err
    for step in VERSIONS:
        assert relexio("restore", out, "--step", step, "-o", tmp_path / f"back-{step}").code == 0
        assert (tmp_path / f"back-{step}" / "config.json").exists()
    assert relexio("verify", out, runs / case, "--base", runs / "base").code == 0
    assert relexio("predict", out, "--method", "relex", "--step", 12, "-o", tmp_path / "predicted").code == 0
    done = relexio("convert", runs / case, "-o", out, "--delete-verified")
    assert "the trajectory has the model that these files make" in done.out + done.err
    assert version(runs, case, 5).exists()
    shutil.copytree(runs / case, tmp_path / "copied", copy_function=shutil.copyfile)
    assert "written again" not in (done := relexio("convert", tmp_path / "copied", "-o", out)).out + done.err
    stored = open_store(out)
    assert verify(stored, find_originals(stored, runs / case, None), CPU, silent).compared == VERSIONS


@pytest.mark.parametrize("case", ["slime-xor", "skyrl"])
def test_a_version_is_whole_when_its_last_file_is_there(runs: Path, case: str) -> None:
    """The trainers write the index, or the manifest, behind everything else."""
    for number in (1, STILL):
        path = version(runs, case, number)
        watch, last = Watch(runs / case, 5.0), next(path.glob("*.json"))
        assert watch.is_whole(number, path, weight_stamps(path), 0.0)
        last.rename(runs / "last")
        assert not watch.is_whole(number, path, weight_stamps(path), 0.0)
        if number != STILL:
            with pytest.raises(ValueError, match=f"has no {last.name}, which the trainer writes last"):
                open_checkpoint(path, number)
        (runs / "last").rename(last)


def test_versions_are_followed_and_each_is_unpacked_once(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version is taken when its last file is there, without waiting; one in which nothing changed, too."""
    later, todo, read, added = tmp_path / "later", list(VERSIONS), list[tuple[int, str]](), list[int]()
    (runs / "slime-xor").rename(later)
    (runs / "slime-xor").mkdir()
    monkeypatch.setattr(Delta, "frame", _noting(read))
    monkeypatch.setattr(follow, "_QUIET", 1e9)
    request = Request(tmp_path / "run.zarr", runs / "base", runs / "slime-xor")
    for event in follow.follow(request, VERSIONS[-1], None, CPU, silent):
        if isinstance(event, follow.Looked) and todo:
            path = version(runs, "slime-xor", todo.pop(0))
            shutil.copytree(later / path.name, path)
        elif isinstance(event, follow.Added):
            added += event.conversion.steps
    assert added == list(VERSIONS)
    assert read.count((5, LEFT)) == 0 and all(read.count((5, name)) == 1 for name in model(0) if name != LEFT)
    stored = open_store(tmp_path / "run.zarr")
    for step in VERSIONS:
        same(back(stored, step, tmp_path / f"back-{step}"), model(step))


def test_an_interrupted_conversion_goes_on(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 64, 64)
    apply, left = chains._Spool.apply, [60]

    def stop(spool: chains._Spool, place: int, first: int, out: memoryview) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        apply(spool, place, first, out)

    conversion = prepare(Request(tmp_path / "run.zarr", runs / "base", runs / "skyrl"), CPU, silent)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(chains._Spool, "apply", stop)
        convert(conversion, silent)
    result = convert(prepare(Request(tmp_path / "run.zarr", runs / "base", runs / "skyrl"), CPU, silent), silent)
    assert result.resumed
    for step in VERSIONS:
        same(back(result.store, step, tmp_path / f"back-{step}"), model(step))


def test_a_chain_is_one_for_all_its_versions(runs: Path) -> None:
    base = open_checkpoint(runs / "base")
    found = models(runs, "slime-xor", base)
    assert Chain.of(base, (runs / "slime-xor").resolve()).links.keys() == set(VERSIONS)
    assert found[5].scratch > max(array.nbytes for array in model(0).values())
