"""Bad input ends in one line that names what is wrong, and leaves everything on disk as it was."""

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.cli.main import main
from relexio.store.blocks import Written
from relexio.store.schema import Block
from relexio.verbs.convert import encode, write
from tests.support.command import Outcome, Relexio, in_process, in_turn, snapshot
from tests.support.make import Tensors, load_file, make_run, save_file
from tests.support.steps import small_blocks
from tests.support.tamper import reseal

FILE = "model.safetensors"
EMBED, NORM, HEAD = "embed.weight", "norm.weight", "value_head.weight"
SHAPES = {EMBED: (16, 8), NORM: (24,), HEAD: (8, 2)}
NEW, APPEND = "convert steps --base base -o new", "convert steps -o store"
PREDICT, INSPECT = "predict store --method relex --step 9 -o out", "inspect store"
STEP, BASE = Path("steps/global_step_5"), Path("base")

Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 1, 2, 3, 5, and a store of the steps 1, 2, 3."""
    root = tmp_path_factory.mktemp("made")
    run = make_run(root, steps=(1, 2, 3, 5), shapes=SHAPES)
    with pytest.raises(SystemExit) as end:
        main(f"convert {run.steps_path} --base {run.base_path} --steps 1:3 -o {root / 'store'}".split())
    assert not end.value.code
    return root


@pytest.fixture(autouse=True)
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a copy of its own as the current directory."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "run"))


def state() -> dict[str, bytes | None]:
    """Every file and directory here, save what stores keep in their caches."""
    found = {**dict.fromkeys(map(str, Path().rglob("*"))), **snapshot(Path())}
    return {name: data for name, data in found.items() if "cache" not in Path(name).parts}


def refused(run: Callable[..., Outcome], command: str, *says: str, code: int = 1) -> str:
    """Run a command that must fail, and leave no trace; what it said, in one line if the fault is the input's."""
    before = state()
    done = run(*command.split())
    said = [line for line in done.err.splitlines() if not line.startswith("note: ")]
    assert done.code == code, done
    assert "Traceback" not in done.err + done.out
    assert code == 2 or [line[:7] for line in said] == ["error: "], done.err
    assert not [word for word in says if word not in said[-1]], said
    assert state() == before
    assert not list(Path().rglob("*.relexio-partial"))
    return said[-1]


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def raw(header: bytes) -> Spoil:
    """A file of this header and 64 bytes."""
    return lambda c: (c / FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def header(name: str = "w", metadata: object = None, **change: object) -> Spoil:
    """A file of one good tensor, save for what is changed."""
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], **change}
    return raw(json.dumps({"__metadata__": metadata, name: entry}).encode())


def tensors(change: Callable[[Tensors], object]) -> Spoil:
    """The same checkpoint with its tensors changed."""

    def spoil(c: Path) -> None:
        found = {name: array.copy() for name, array in load_file(c / FILE).items()}
        change(found)
        save_file(c / FILE, found)

    return spoil


def element(name: str, value: float) -> Spoil:
    return tensors(lambda t: t[name].reshape(-1).__setitem__(3, value))


#: What can be wrong with the files of one checkpoint, and words that the error must hold.
FILES: dict[str, tuple[Spoil, list[str]]] = {
    "empty": (lambda c: cut(c / FILE, 0), [FILE, "truncated"]),
    "cut in the header": (lambda c: cut(c / FILE, 60), [FILE, "truncated"]),
    "cut in the data": (lambda c: cut(c / FILE, -1), [FILE, "truncated"]),
    "no JSON": (raw(b"\x80\x02}q\0"), [FILE, "JSON"]),
    "deep JSON": (raw(b"[" * 100_000), [FILE, "JSON"]),
    "a far offset": (header(data_offsets=[2**60, 2**60 + 64]), [FILE, "tensor w"]),
    "an unknown dtype": (header(dtype="F13"), [FILE, "tensor w", "F13"]),
    "a vast shape": (header(shape=[2**60] * 40), [FILE, "tensor w"]),
    "metadata that is no text": (header(metadata=[7]), [FILE]),
    "a name over two lines": (header("w\nerror: \x1b[2J", dtype="F13"), [FILE, "F13"]),
}

#: What can be wrong with one step held against its base.
STEPS: dict[str, tuple[Spoil, list[str]]] = {
    "another shape": (tensors(lambda t: t.update({NORM: t[NORM][1:]})), [NORM, "shape [23]", "[24]"]),
    "a turned shape": (tensors(lambda t: t.update({EMBED: t[EMBED].T})), [EMBED, "[8, 16]", "[16, 8]"]),
    "another dtype": (tensors(lambda t: t.update({EMBED: t[EMBED].astype("i4")})), [EMBED, "dtype I32", "BF16"]),
    "a missing tensor": (tensors(lambda t: t.pop(NORM)), [NORM, "lacks tensors of"]),
    "one tensor more": (tensors(lambda t: t.update(extra=t[NORM])), ["extra", "tensors that are not in"]),
    "NaN": (element(NORM, np.nan), [NORM, "NaN"]),
    "infinity": (element(EMBED, np.inf), [EMBED, "Inf"]),
    "minus infinity": (element(HEAD, -np.inf), [HEAD, "Inf"]),
    "the base, copied": (lambda c: shutil.copy(BASE / FILE, c / FILE), ["base itself", "bit for bit"]),
    "the base, linked": (in_turn(shutil.rmtree, lambda c: c.symlink_to(BASE.resolve())), ["base itself"]),
    "two directories": (lambda c: shutil.copytree(c, "steps/checkpoint-5"), ["two directories", "steps/checkpoint-5"]),
}


@pytest.mark.parametrize("command", [NEW, APPEND])
@pytest.mark.parametrize("fault", [*FILES, *STEPS])
def test_a_bad_step_is_refused(relexio: Relexio, fault: str, command: str) -> None:
    spoil, says = {**FILES, **STEPS}[fault]
    shutil.copytree(STEP, "steps/global_step_6")  # or step 5 might be one that is still being written
    spoil(STEP)
    said = refused(relexio, command, *says)
    assert "step 5" in said or str(STEP) in said


@pytest.mark.parametrize("fault", FILES)
def test_a_bad_base_is_refused(relexio: Relexio, fault: str) -> None:
    FILES[fault][0](BASE)
    refused(relexio, NEW, *FILES[fault][1], "base")


@pytest.mark.parametrize(
    ("added", "dtype"),
    [(".absmax", "u1"), ("_scale_inv", "f4"), ("_scale", "f4"), ("_blocks", "u1")],
)
def test_a_quantized_base_is_refused_as_such(relexio: Relexio, added: str, dtype: str) -> None:
    tensors(lambda t: t.update({EMBED + added: np.zeros(3, dtype)}))(BASE)
    refused(relexio, NEW, EMBED + added, "the base is quantized: give the model that was quantized, with --base")


def test_nan_in_the_base_is_refused_where_it_changes_and_kept_where_it_never_does(relexio: Relexio) -> None:
    element(NORM, np.nan)(BASE)
    refused(relexio, NEW, NORM, "NaN", "base")
    for step in (1, 2, 3, 5):
        element(NORM, np.nan)(Path(f"steps/global_step_{step}"))
    assert relexio(*NEW.split()).code == 0
    assert relexio("predict", "new", "--method", "relex", "--step", "9", "-o", "out").code == 0
    assert np.flatnonzero(np.isnan(load_file(Path("out", FILE))[NORM].astype("f4"))).tolist() == [3]


def test_nothing_is_written_any_more_once_the_error_is_told(relexio: Relexio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are slow with other blocks must have ended before the error cleans up behind them."""

    def slow(job: encode.Job, block: Block) -> tuple[Written, Written | None]:
        time.sleep(0.0 if block.index == 0 else 0.2)
        return encode.encode_block(job, block)

    small_blocks(monkeypatch, 64)
    monkeypatch.setattr(write, "encode_block", slow)
    element(EMBED, np.nan)(STEP)
    before = state()
    refused(relexio, NEW + " --workers 3", EMBED, "NaN")
    time.sleep(0.5)
    assert state() == before


#: Parts of the store, each with a command that reads it.
CHUNKS = [
    *[("base/bf16/bits/c/0", command) for command in (PREDICT, INSPECT, APPEND)],
    *[
        (f"segments/0000/{array}/0", command)
        for array in ("bf16/when/c", "bf16/by/c", "bf16/index/c/0", "bf16/hashes/c", "changed/c/0")
        for command in (PREDICT, INSPECT)
    ],
    ("segments/0000/bf16/digest/c/0/0/0", APPEND),
    ("base/bf16/hashes/c/0", PREDICT),
    ("base/bf16/digest/c/0/0", f"{APPEND} --base base"),
    ("files/*/c/0", PREDICT),
]


@pytest.mark.parametrize("damage", [Path.unlink, lambda p: flip(p, -1), lambda p: flip(p, 20), lambda p: cut(p, 9)])
@pytest.mark.parametrize(("chunk", "command"), CHUNKS)
def test_a_damaged_chunk_is_refused_by_name(relexio: Relexio, chunk: str, command: str, damage: Spoil) -> None:
    for path in Path("store").glob(chunk):
        damage(path)
    refused(relexio, command, "store", chunk.split("/*")[0].split("/c/")[0], "damaged")


def test_steps_are_not_added_to_a_damaged_chain(relexio: Relexio) -> None:
    """What a new step is stored as depends on the step before, which is read from the store where its files are gone."""
    assert relexio(*NEW.split(), "--steps", "1:3").code == 0
    chunk, append = Path("new/segments/0000/bf16/by/c/0"), "convert steps -o new"
    flip(chunk, 20)
    shutil.move("steps/global_step_3", "away")
    refused(relexio, append, "new", "segments/0000/bf16/by/c/0", "damaged")
    shutil.move("away", "steps/global_step_3")
    assert relexio(*append.split()).code == 0
    flip(chunk, 20)
    assert relexio("verify", "new", "steps").code == 0


@pytest.mark.parametrize("damage", [Path.unlink, lambda p: cut(p, 40), lambda p: p.write_text("[]")])
@pytest.mark.parametrize("node", ["", "base", "segments/0000", "segments/0000/bf16/by", "segments/0000/changed"])
@pytest.mark.parametrize("command", [PREDICT, INSPECT])
def test_damaged_zarr_metadata_is_refused(relexio: Relexio, command: str, node: str, damage: Spoil) -> None:
    damage(Path("store", node, "zarr.json"))
    refused(relexio, command, "store")
    if node in ("", "base"):
        refused(relexio, APPEND, "store")


@pytest.mark.parametrize("command", [PREDICT, INSPECT, APPEND])
@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"format": 4}, "upgrade"),
        ({"format": 2}, "convert the run again"),
        ({"format": "1"}, "not a relexio trajectory"),
    ],
)
def test_a_store_of_another_format_is_refused(relexio: Relexio, command: str, record: Any, says: str) -> None:
    edit(Path("store/zarr.json"), lambda z: z["attributes"]["relexio"].update(record))
    refused(relexio, command, "store", says)


@pytest.mark.parametrize("where", ["shards", "side"])
def test_a_store_that_names_files_outside_the_output_is_refused(relexio: Relexio, where: str) -> None:
    def rename(z: Any) -> None:
        base = z["attributes"]["source"]
        if where == "shards":
            base["shards"][0]["name"] = "../evil"
        else:
            base["side"]["../evil"] = base["side"]["config.json"]

    edit(Path("store/base/zarr.json"), rename)
    reseal(Path("store"))
    refused(relexio, PREDICT, "../evil")


LONG = "m" * 300
ENDS = [
    "inspect",
    "predict store --method relex --step 9 -o",
    NEW[:-3],
    "convert steps -o new --base",
    "convert -o new --base base",
]
REQUESTS = {
    **{
        f"{command} --memory 1MB": ["1 MB is too small", "one worker needs"]
        for command in (NEW, APPEND, PREDICT, INSPECT)
    },
    **{f"{command} --rank 4": ["--rank 4", "1 to 3"] for command in (PREDICT, INSPECT)},
    **{f"{command} --window 4,2": ["step 4", "steps 1, 2, 3"] for command in (PREDICT, INSPECT)},
    **{f"{command} {LONG}": [LONG] for command in ENDS},
    f"{PREDICT} --window 7:9": ["7:9", "steps 1, 2, 3"],
    f"{PREDICT} --window 1": ["a window of 1 step"],
    f"{PREDICT} --strength nan": ["--strength nan"],
    f"{PREDICT} --strength 1e44": ["overflows", "BF16"],
    f"{PREDICT} --strength 1e308": ["--strength"],
    f"{PREDICT} --method reconstruct": ["--step 9", "1..3"],
    f"{PREDICT} --method secant --rank 2": ["--method secant does not use --rank"],
    f"{PREDICT} --fit poly3": ["--fit poly3", "at least 4 steps", "has 3"],
    f"{PREDICT} --method mean --last 4": ["--last 4", "1 to 3"],
    "predict store --method relex --refit 1 --step 1000000000 -o out": ["1000000000", "--refit"],
    f"{PREDICT} --include *.nothing": ["--include '*.nothing'", "matches none of the"],
    f"{PREDICT} --exclude *": ["leave no tensor"],
    "reconstruct store --step 9 -o out": ["--step 9", "1..3"],
    "reconstruct store --step 2 --rank 4 -o out": ["--rank 4", "1 to 3"],
    "backtest store --window 1:2": ["at least 3", "there are 2"],
    "backtest store --memory 1MB": ["1 MB is too small"],
    "findings store --rank 4": ["--rank 4", "1 to 3"],
    "findings store --window 1": ["a window of 1 step"],
    "predict store --method relex --step 3 -o out": ["--step 3", "ends at step 3"],
    "predict store --step 2 -o out --method pinned": ["--step 2", "ends at step 3"],
    "predict store --method relex --step 9 --step 9 -o out-{step}": ["given twice"],
    "predict store --method relex --step 8 --step 9 -o {step}/../out": ["one name"],
    "predict store --method relex --step 9 -o base": ["base: exists"],
    f"predict store --method relex --step 9 -o base/{FILE}": [f"{FILE}: exists"],
    f"predict store --method relex --step 9 -o base/{FILE}/out": [f"base/{FILE}"],
    "predict absent --method relex --step 9 -o out": ["absent", "no such trajectory"],
    "inspect base": ["base", "not a relexio trajectory"],
    f"inspect base/{FILE}": [FILE, "not a relexio trajectory"],
    "convert steps --base base -o steps": ["steps: exists and is not a trajectory"],
    f"convert steps --base base -o base/{FILE}": [f"{FILE}: exists and is not a trajectory"],
    "convert steps --base base -o store/base": ["store/base", "not a relexio trajectory"],
    "convert steps --base absent -o new": ["absent: no such directory"],
    "convert steps -o new": ["new", "--base"],
    "convert absent --base base -o new": ["absent: no such directory"],
    "convert base --base base -o new": ["base: no checkpoint found"],
    f"{NEW} --steps 4": ["step 4"],
    f"{NEW} --checkpoint 3=base": ["two directories for step 3"],
    f"{NEW} --checkpoint 0=base": ["step 0", "base itself"],
    f"{APPEND} --base steps/global_step_1": [EMBED, "differs from the base of store"],
}


@pytest.mark.parametrize("command", REQUESTS, ids=lambda command: command.replace(LONG, "long"))
def test_a_request_that_cannot_be_met_is_refused(relexio: Relexio, command: str) -> None:
    refused(relexio, command, *REQUESTS[command])


@pytest.mark.parametrize(
    "command",
    [
        *[f"{NEW} --memory {size}" for size in ("2XB", "0", "-1GB", "lots", "1e9", "GB")],
        *[f"{NEW} --steps {steps}" for steps in ("1-5", "5:1", "1:5:0", "x", "1,,2")],
        *[f"{NEW} --checkpoint {named}" for named in ("base", "x=base", "=a", "7=", "-1=a", "7=a --checkpoint 07=b")],
        *[f"{PREDICT} --step {steps}" for steps in ("10", "9", "-1", "x", "1.5")],
        *[f"{PREDICT} {wrong}" for wrong in ("--rank 0", "--window 3:1", "--workers 0", "--method x", "--device tpu")],
        *["reconstruct store --step 1 --step 2 -o out", "reconstruct store -o out"],
        *["convert -o new --base base", NEW[:-6], "inspect", "x"],
    ],
)
def test_wrong_usage_ends_with_code_2(relexio: Relexio, command: str) -> None:
    refused(relexio, command, "Error: ", code=2)


def test_the_same_holds_in_a_process_of_its_own() -> None:
    refused(in_process, f"{PREDICT} --step 10", code=2)
    STEPS["NaN"][0](STEP)
    refused(in_process, APPEND, "step 5", NORM)
    Path("store/segments/0000/bf16/by/c/0").unlink()
    refused(in_process, PREDICT, "missing")
    shutil.copytree(STEP, "steps/global_step_6")
    FILES["cut in the data"][0](STEP)
    refused(in_process, NEW, str(STEP))
