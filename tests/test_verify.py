"""A store is checked to the last bit, compared with what it was made from, and given back as it was."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.loops import Found, find
from tests.support.command import Relexio, snapshot
from tests.support.make import BF16, Run, make_run, save_checkpoint
from tests.support.steps import fit_run, predict_run, small_blocks, store_run

SHAPES = {"model.embed_tokens.weight": (40, 30), "w": (50, 20), "norm": (9,), "scalar": ()}


@pytest.fixture(autouse=True)
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = make_run(tmp_path, BF16, steps=(1, 2, 4, 7), shapes=SHAPES)
    for step in ("base", "steps/global_step_4"):
        (tmp_path / step / "tokenizer.json").write_text(f'{{"of": "{step}"}}\n')
    return made


def test_what_is_whole_is_said_to_be(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    relexio("convert", run.steps_path, "--base", run.base_path, "--steps", "1:4", "-o", "run.zarr")
    relexio("convert", run.steps_path, "-o", "run.zarr")
    relexio("predict", "run.zarr", "--method", "relex", "--step", 20, "-o", "out")
    done = relexio("verify", "run.zarr", run.steps_path, "--base", run.base_path, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {
        "whole": True,
        "steps": [1, 2, 4, 7],
        "compared": [1, 2, 4, 7],
        "base_compared": True,
        "bytes_checked": 5 * 2 * (40 * 30 + 50 * 20 + 9 + 1),
        "problems": [],
        "not_stored": [],
        "restored_otherwise": [],
    }
    assert "whole: every hash is right" in relexio("verify", "run.zarr").out


def test_an_original_that_differs_is_named(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    relexio("convert", run.steps_path, "--base", run.base_path, "-o", "run.zarr")
    file = run.steps_path / "global_step_4" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    (run.steps_path / "global_step_7").rename(tmp_path / "away")
    save_checkpoint(run.steps_path / "global_step_9", run.steps[7])
    done = relexio("verify", "run.zarr", run.steps_path)
    assert done.code == 1
    assert "step 4" in done.err and "differs" in done.err and done.err.count("error:") == 1
    assert "step 7" in done.err and "step 9" in done.err, "what is not compared is noted"
    data = bytearray((run.base_path / "model.safetensors").read_bytes())
    data[-1] ^= 128
    (run.base_path / "model.safetensors").write_bytes(data)
    done = relexio("verify", "run.zarr", "--base", run.base_path, "--json")
    assert done.code == 1 and "base" in json.loads(done.out)["problems"][0]


def test_side_files_are_compared_too(run: Run, relexio: Relexio) -> None:
    relexio("convert", run.steps_path, "--base", run.base_path, "-o", "run.zarr")
    (run.steps_path / "global_step_4" / "tokenizer.json").write_text("{}")
    (run.steps_path / "global_step_2" / "new.json").write_text("{}")
    (run.base_path / "config.json").unlink()
    (run.steps_path / "global_step_1" / "model.safetensors").write_bytes(b"cut")
    problems = json.loads(relexio("verify", "run.zarr", run.steps_path, "--base", run.base_path, "--json").out)[
        "problems"
    ]
    assert len(problems) == 4
    for step, name in (
        ("step 4", "tokenizer.json"),
        ("step 2", "new.json"),
        ("base", "config.json"),
        ("_1", "truncated"),
    ):
        assert [text for text in problems if step in text and name in text], (step, name)


def test_convert_verifies_what_was_there_before_too(run: Run, relexio: Relexio) -> None:
    relexio("convert", run.steps_path, "--base", run.base_path, "--steps", "1:4", "-o", "run.zarr")
    for _ in range(2):
        done = relexio("convert", run.steps_path, "-o", "run.zarr", "--verify", "--json")
        assert json.loads(done.out)["compared"] == [1, 2, 4, 7]


def test_convert_can_verify_at_once(run: Run, relexio: Relexio, monkeypatch: pytest.MonkeyPatch) -> None:
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", "run.zarr", "--verify")
    assert done.code == 0 and "whole" in done.out and "steps 1, 2, 4, 7" in done.out

    def wrong(*arguments: Any) -> Found:
        found = find(*arguments)
        found.by[:1] ^= 1
        return found

    monkeypatch.setattr("relexio.verbs.convert.encode.find", wrong)
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", "bad.zarr", "--verify")
    assert done.code == 1 and "differs" in done.err and "not the bits that were hashed" in done.err


@pytest.mark.parametrize("shards", [1, 2])
def test_restore_gives_back_every_byte(tmp_path: Path, relexio: Relexio, shards: int) -> None:
    made = make_run(tmp_path, BF16, steps=(1, 2, 4), shapes=SHAPES, shards=shards)
    (made.steps_path / "global_step_2" / "chat_template.jinja").write_text("{{ x }}\n")
    relexio("convert", made.steps_path, "--base", made.base_path, "-o", "run.zarr")
    for step, original in ((2, made.steps_path / "global_step_2"), ("base", made.base_path)):
        done = relexio("restore", "run.zarr", "--step", step, "-o", f"back-{step}")
        assert done.code == 0, done.err
        assert snapshot(tmp_path / f"back-{step}") == snapshot(original)
    assert relexio("restore", "run.zarr", "--step", 3, "-o", "no").code == 1
    assert relexio("restore", "run.zarr", "--step", 2, "-o", "back-2").code == 1, "nothing is overwritten"
    assert relexio("restore", "run.zarr", "--step", "x", "-o", "no").code == 2
    assert not Path("no").exists()


def outcome(relexio: Relexio, out: Path) -> bytes | None:
    """The prediction that a store gives, None if it is refused in one clear line."""
    shutil.rmtree(out, ignore_errors=True)
    done = relexio("predict", "run.zarr", "--method", "relex", "--step", 20, "-o", out)
    if done.code == 0:
        return (out / "model.safetensors").read_bytes()
    assert done.code == 1 and done.err.count("error:") == 1 and "run.zarr" in done.err, done
    return None


@pytest.mark.slow
def test_any_flipped_bit_is_found(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    """In every file of the store: verify names it, and no prediction is ever another one."""
    relexio("convert", run.steps_path, "--base", run.base_path, "--steps", "1:4", "-o", "run.zarr")
    relexio("convert", run.steps_path, "-o", "run.zarr")
    want = outcome(relexio, tmp_path / "out")
    rng = random.Random(0)
    files = sorted(path for path in Path("run.zarr").rglob("*") if path.is_file())
    assert len(files) > 30
    for path in files:
        data = path.read_bytes()
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        assert outcome(relexio, tmp_path / "out") in (want, None), path
        done = relexio("verify", "run.zarr")
        assert done.code == 1, f"{path}, byte {at}"
        named = path.parent if path.name == "zarr.json" else Path(str(path).split("/c/")[0])
        assert any(str(part) in done.err for part in (named, path, *list(named.parents)[:-1])), done.err
        path.write_bytes(data)
    assert relexio("verify", "run.zarr").code == 0


def test_what_an_interrupted_command_left_is_noted(run: Run, relexio: Relexio) -> None:
    relexio("convert", run.steps_path, "--base", run.base_path, "-o", "run.zarr")
    shutil.copytree("run.zarr/segments/0000", "run.zarr/segments/0001")
    shutil.copytree(next(Path("run.zarr/files").glob("*/")), f"run.zarr/files/{'0' * 32}")
    done = relexio("verify", "run.zarr")
    assert done.code == 0 and f"not read: files/{'0' * 32}, segments/0001" in done.err


def test_the_last_step_may_be_unfinished(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    """What a trainer is still writing is left out with a note; the next run takes it."""
    file = run.steps_path / "global_step_7" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    (run.steps_path / "global_step_8").mkdir()
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", "run.zarr")
    assert done.code == 0, done.err
    assert "step 7 is not complete yet" in done.err and "step 8 is not complete yet" in done.err
    assert relexio("convert", run.steps_path, "-o", "run.zarr", "--steps", "7").code == 1, "asked for by its number"
    file.write_bytes(whole)
    assert relexio("convert", run.steps_path, "-o", "run.zarr").code == 0
    predict_run(fit_run(store_run(run, Path("whole.zarr"), "1:7")), 20, tmp_path / "want")
    assert relexio("predict", "run.zarr", "--method", "relex", "--step", 20, "-o", "out").code == 0
    assert (tmp_path / "want/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


def test_an_unfinished_step_before_a_whole_one_is_an_error(run: Run, relexio: Relexio) -> None:
    file = run.steps_path / "global_step_2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", "run.zarr")
    assert done.code == 1 and "global_step_2" in done.err and not Path("run.zarr").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "secret.json", "sub/secret.txt"])
def test_links_out_of_a_checkpoint_are_refused(run: Run, tmp_path: Path, relexio: Relexio, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((run.steps_path / "global_step_2" / "model.safetensors").read_bytes())
    link = run.steps_path / "global_step_2" / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", "run.zarr")
    assert done.code == 1 and name in done.err and "link" in done.err and not Path("run.zarr").exists()


def test_links_of_the_hubs_cache_are_followed(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    model = tmp_path / "hub/models--a--b"
    snapshot_ = model / "snapshots/0123"
    snapshot_.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(run.base_path.iterdir())):
        shutil.copy(file, model / f"blobs/{number}")
        (snapshot_ / file.name).symlink_to(f"../../blobs/{number}")
    assert relexio("convert", run.steps_path, "--base", snapshot_, "-o", "run.zarr").code == 0


def test_a_second_writer_is_told_who_the_first_is(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    relexio("convert", run.steps_path, "--base", run.base_path, "--steps", "1:4", "-o", "run.zarr")
    hold = "import sys, time; from relexio.atomic import locked; from pathlib import Path\n"
    hold += "with locked(Path('run.zarr')): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        done = relexio("convert", run.steps_path, "-o", "run.zarr")
        assert done.code == 1 and "is writing it" in done.err
        assert f"process {holder.pid} is" in done.err or "another process is" in done.err
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    assert relexio("convert", run.steps_path, "-o", "run.zarr").code == 0, "the kernel gives a dead process's lock back"


def test_blocks_of_any_size_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relexio: Relexio) -> None:
    small_blocks(monkeypatch, 128, 16)
    made = make_run(tmp_path, np.dtype("float32"), steps=(1, 2, 4), shapes=SHAPES)
    store_run(made, tmp_path / "run.zarr")
    done = relexio("verify", "run.zarr", made.steps_path, "--base", made.base_path)
    assert done.code == 0, done.err


def test_stored_files_that_have_changed_places(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    """Their chunks' checksums are right; their names are not those of their bytes."""
    for name in "ab":
        (run.base_path / f"{name}.json").write_text(f'"{name}"')
    relexio("convert", run.steps_path, "--base", run.base_path, "-o", "run.zarr")
    found = {path.read_bytes(): path for path in Path("run.zarr/files").glob("*/c/0")}
    one, other = (
        path for path in found.values() if json.loads((path.parents[1] / "zarr.json").read_text())["shape"] == [3]
    )
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    for command in (
        ["predict", "run.zarr", "--method", "relex", "--step", 9],
        ["restore", "run.zarr", "--step", "base"],
    ):
        done = relexio(*command, "-o", "out")
        assert done.code == 1 and "not the bytes that were hashed" in done.err and not Path("out").exists()
    done = relexio("verify", "run.zarr")
    assert done.code == 1 and str(one.parents[1].name) in done.err and str(other.parents[1].name) in done.err


def test_what_a_killed_writer_left_beside_the_marker_goes(run: Run, relexio: Relexio) -> None:
    relexio("convert", run.steps_path, "--base", run.base_path, "--steps", "1:2", "-o", "run.zarr")
    left = [Path("run.zarr/zarr.0123.partial"), Path("run.zarr/zarr.json.0123.partial")]
    for path in left:
        path.write_text("{")
    assert relexio("convert", run.steps_path, "-o", "run.zarr").code == 0
    assert not any(path.exists() for path in left)


def test_damage_of_a_record_hides_no_other(run: Run, relexio: Relexio) -> None:
    store = run.root / "run.zarr"
    assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", store).code == 0
    chunk = next(path for path in sorted(store.glob("base/*/bits/c/*")))
    file = next(path for path in sorted(store.glob("files/*/c/0")))
    for path in (chunk, file, store / "segments/0000/zarr.json"):
        path.write_bytes(path.read_bytes()[:-1])
    done = relexio("verify", store)
    assert done.code == 1
    for name in (chunk, file.parent.parent, store / "segments/0000/zarr.json"):
        assert str(name.relative_to(store)) in done.err, done.err


@pytest.mark.parametrize(
    "lost", ["files/*/c/0", "files/*/zarr.json", "files/zarr.json", "segments/zarr.json", "base/bf16/zarr.json"]
)
def test_what_a_power_loss_took_of_an_unfinished_conversion(
    run: Run, relexio: Relexio, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Killed among its blocks; what was not synced is gone: nothing of that is taken for whole."""
    command, store = (
        ["convert", run.steps_path, "--base", run.base_path, "-o", run.root / "run.zarr"],
        run.root / "run.zarr",
    )

    def dying(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("relexio.verbs.convert.write.write_small", dying)
        assert relexio(*command).code == 130
    for path in store.with_name("run.zarr.relexio-partial").glob(lost):
        path.write_bytes(b"")
    if relexio(*command).code:
        assert relexio(*command).code == 0
    done = relexio("verify", store, run.steps_path, "--base", run.base_path)
    assert done.code == 0 and "whole" in done.out, done
