"""What belongs to a model is stored, whatever its name or size; what is not stored is said where people decide."""

import json
import os
import shutil
from pathlib import Path

import pytest

from relexio.checkpoints.layout import open_checkpoint
from relexio.checkpoints.record import CheckpointRecord, NotStored
from relexio.errors import CheckpointError, StorageError, StoreError
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.verbs.restore import restore
from tests.support.command import Relexio, snapshot
from tests.support.make import Run, make_run, save_checkpoint
from tests.support.steps import CPU, fit_run, predict_run, store_run

STATE = {
    "optimizer.pt": 900, "scheduler.pt": 20, "rng_state.pth": 30, "rng_state_1.pth": 30, "training_args.bin": 40,
    "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt": 500, "pytorch_model_fsdp_0/__0_0.distcp": 70,
    "events.out.tfevents.17.host": 9, "runs/now/events": 9, "checkpoint-3/config.json": 9, ".git/config": 9,
}  # fmt: skip
MODEL = (
    "vocab", "merges.bpe2", "a/b/c/d/deep.xyz", "value_head.safetensors", "spk_dict.pt", "trainer_state.json", ".gitattributes",
    "pytorch_model.bin.index.json",
)  # fmt: skip


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Steps with all sorts of files beside the weights."""
    monkeypatch.chdir(tmp_path)
    made = make_run(tmp_path, steps=(1, 2, 4))
    for step in made.steps:
        folder = made.steps_path / f"global_step_{step}"
        put(folder, {name: bytes(size) for name, size in STATE.items()})
        put(folder, {name: f"{name} of {step}".encode() for name in MODEL})
        os.mkfifo(folder / "pipe")
        (folder / "dead").symlink_to("nowhere")
    return made


def convert(relexio: Relexio, run: Run, *more: object) -> str:
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", "run.zarr", *more)
    assert done.code == 0, done.err
    return done.out


def without_state(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in snapshot(folder).items() if name not in STATE}


def test_what_belongs_to_the_model_comes_back(run: Run, relexio: Relexio) -> None:
    convert(relexio, run)
    shutil.rmtree(run.base_path)
    for step in run.steps:
        assert relexio("restore", "run.zarr", "--step", step, "-o", f"back-{step}").code == 0
        assert snapshot(Path(f"back-{step}")) == without_state(run.steps_path / f"global_step_{step}")
        assert {*MODEL, "model.safetensors", "config.json"} <= snapshot(Path(f"back-{step}")).keys()


def test_what_is_not_stored_is_said(run: Run, relexio: Relexio) -> None:
    put(run.steps_path, {"train.log": b"log", "wandb/x": b"1"})
    said = convert(relexio, run)
    verified = relexio("verify", "run.zarr", run.steps_path, "--base", run.base_path).out
    restored = relexio("restore", "run.zarr", "--step", 2, "-o", "back").out
    for text in (said, verified, restored):
        (line,) = [line for line in text.splitlines() if line.startswith("not stored") and "optimizer.pt" in line]
        assert line.endswith(": training cannot be resumed without some of them") and "kB" in line
    assert "a step" in said and "a step" in verified and "a step" not in restored
    assert "beside the steps: train.log, wandb/ (4 B)" in verified
    assert "the files compared are the same" in verified
    assert "compared    the base\n" in relexio("verify", "run.zarr", "--base", run.base_path).out
    save_checkpoint(run.steps_path / "global_step_90", run.steps[2])
    (beside,) = [line for line in relexio("verify", "run.zarr", run.steps_path).out.splitlines() if "beside" in line]
    assert "global_step_90/" in beside and "cannot be resumed" not in beside
    assert "the files compared" not in relexio("verify", "run.zarr").out, "nothing was compared"


def test_what_may_be_the_models_stands_before_a_trainers_state(
    run: Run, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not behind more files than are shown; and training does not need it."""
    monkeypatch.setattr("relexio.checkpoints.files._MOST", 1 << 10)
    for step in run.steps:
        put(run.steps_path / f"global_step_{step}", {f"optimizer_{a}.pt": b"1" for a in "abcdef"})
        put(run.steps_path / f"global_step_{step}", {"vocab.json": bytes(1 << 11)})
    (line,) = [line for line in convert(relexio, run).splitlines() if line.startswith("not stored")]
    assert line.startswith(
        "not stored  .git/, checkpoint-3/, dead, events.out.tfevents.17.host, pipe, runs/, vocab.json,"
    )
    assert line.endswith("): training cannot be resumed without some of them")


def test_scripts_are_told_too(run: Run, relexio: Relexio) -> None:
    whole = json.loads(convert(relexio, run, "--json"))["not_stored"]
    verified = json.loads(relexio("verify", "run.zarr", run.steps_path, "--json").out)["not_stored"]
    shutil.rmtree(run.steps_path)
    restored = json.loads(relexio("restore", "run.zarr", "--step", 2, "-o", "back", "--json").out)["not_stored"]
    names = {name.split("/")[0] + "/" * ("/" in name) for name in STATE} | {"pipe", "dead"}
    for left, of, checkpoints in ((whole, "steps", 3), (verified, "steps", 3), (restored, "step 2", 1)):
        assert len(left) == 1 and (left[0]["of"], left[0]["checkpoints"]) == (of, checkpoints)
        assert left[0]["files"].keys() == names and left[0]["more"] == 0
        assert left[0]["bytes"] == checkpoints * sum(STATE.values())
        assert left[0]["files"]["pipe"] == 0


def test_only_a_trainers_state(tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, steps=(1, 2))
    for step in run.steps:
        put(run.steps_path / f"global_step_{step}", {"scheduler.pt": b"1", "optimizer.pt": b"23"})
    said = "not stored  optimizer.pt, scheduler.pt (3 B a step): training cannot be resumed without them\n"
    assert said in convert(relexio, run)


def test_nothing_is_said_of_nothing(tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, steps=(1, 2))
    assert "not stored" not in convert(relexio, run)
    assert "not stored" not in relexio("verify", "run.zarr", run.steps_path, "--base", run.base_path).out
    base, steps = (json.loads(Path(f"run.zarr/{path}/zarr.json").read_text()) for path in ("base", "segments/0000"))
    records = [base["attributes"]["source"], *steps["attributes"]["sources"]]
    assert len(records) == 3 and not any("not_stored" in record for record in records)


def test_what_a_trainer_writes_around_the_model(
    tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make_run(tmp_path / "made", steps=(1, 2))
    for step in made.steps:
        actor = tmp_path / f"steps/global_step_{step}/actor"
        shutil.copytree(made.steps_path / f"global_step_{step}", actor / "huggingface")
        put(
            actor.parent,
            {"data.pt": b"12", "critic/model.safetensors": b"12345", "actor/optim_world_size_2_rank_0.pt": b"1"},
        )
    run = Run(tmp_path / "made", made.base, {})
    run.steps_path = tmp_path / "steps"
    convert(relexio, run)
    (left,) = json.loads(relexio("verify", "run.zarr", run.steps_path, "--json").out)["not_stored"]
    assert left["files"] == {"actor/optim_world_size_2_rank_0.pt": 2, "critic/": 10, "data.pt": 4}


def test_a_file_of_the_model_that_came_later_is_a_problem(run: Run, relexio: Relexio) -> None:
    convert(relexio, run)
    put(run.steps_path / "global_step_2", {"added": b"x"})
    done = relexio("verify", "run.zarr", run.steps_path)
    assert done.code == 1 and "step 2" in done.err and "added: is not among what" in done.err


def test_large_files_are_stored_and_those_of_tensors_named(
    tmp_path: Path, run: Run, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("schema", "arrays", "write"):
        monkeypatch.setattr(f"relexio.store.{module}.FILE_CHUNK", 1 << 10)
    monkeypatch.setattr("relexio.checkpoints.files._MOST_TENSORS", 4096)
    monkeypatch.setattr("relexio.checkpoints.files._MOST", 1 << 16)
    large = os.urandom(5 * 1024 + 17)
    put(run.base_path, {"tokenizer.big": large, "zeros": bytes(2048), "empty": b"", "huge": bytes(1 << 17)})
    put(run.base_path, {"original/consolidated.00.pth": bytes(5000)})
    said = convert(relexio, run)
    assert "base: huge, original/ (136 kB)\n" in said
    assert relexio("restore", "run.zarr", "--step", "base", "-o", "back").code == 0
    gone = ("huge", "original/consolidated.00.pth")
    assert snapshot(Path("back")) == {n: d for n, d in snapshot(run.base_path).items() if n not in gone}
    assert relexio("verify", "run.zarr", run.steps_path, "--base", run.base_path).code == 0
    assert relexio("predict", "run.zarr", "--method", "relex", "--step", 9, "-o", "out").code == 0
    assert Path("out/tokenizer.big").read_bytes() == large
    (pieces,) = [p for p in Path("run.zarr/files").glob("*/c") if len(list(p.iterdir())) == 6]
    one, other = pieces / "1", pieces / "3"
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    for command in ("restore", "predict"):
        done = relexio(command, "run.zarr", "--step", 2 if command == "restore" else 9, "-o", "again")
        assert (done.code == 0) == (command == "restore"), "a step's own files are whole"
    assert relexio("verify", "run.zarr").code == 1


def test_a_prediction_has_no_tensors_of_another_step_beside_its_own(tmp_path: Path, run: Run) -> None:
    put(run.base_path, {"value_head.safetensors": b"x", "sub/vocab": b"y"})
    found = snapshot(predict_run(fit_run(store_run(run, tmp_path / "run.zarr")), 9, tmp_path / "out"))
    assert "sub/vocab" in found and "merges.bpe2" in found
    assert [name for name in found if name.endswith((".safetensors", ".pt", ".bin", ".index.json"))] == [
        "model.safetensors"
    ]


def test_links_to_directories_are_named_and_not_followed(tmp_path: Path, run: Run) -> None:
    (tmp_path / "elsewhere").mkdir()
    put(tmp_path / "elsewhere", {"secret.json": b"{}"})
    (run.base_path / "link").symlink_to(tmp_path / "elsewhere")
    (run.base_path / "loop").symlink_to(".")
    found = open_checkpoint(run.base_path)
    assert found.not_stored() == {"link": 0, "loop": 0}
    assert "secret.json" not in "".join(found.side)


def test_the_record_stays_small(tmp_path: Path, run: Run) -> None:
    put(run.base_path, {f"optimizer_{number:03}.pt": bytes(number) for number in range(100)})
    left = store_run(run, tmp_path / "run.zarr").base().not_stored
    assert (len(left.files), left.more, left.bytes) == (20, 80, 4950)
    assert "optimizer_099.pt" in left.files and "optimizer_000.pt" not in left.files, "the largest are named"


def test_an_interrupted_convert_goes_on_though_the_trainer_tidied_up(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, relexio: Relexio
) -> None:
    def full(*_: object) -> None:
        raise StorageError("full")

    with monkeypatch.context() as patched:
        patched.setattr("relexio.verbs.convert.write._commit", full)
        assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", "run.zarr").code == 1
    (run.steps_path / "global_step_1/optimizer.pt").unlink()
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", "run.zarr")
    assert done.code == 0 and "continued from what an interrupted run" in done.err
    store = open_store(tmp_path / "run.zarr")
    assert "optimizer.pt" not in store.record(1).not_stored.files and "optimizer.pt" in store.record(2).not_stored.files
    assert relexio("verify", "run.zarr").code == 0


def test_a_side_file_that_changes_meanwhile_is_an_error(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, relexio: Relexio
) -> None:
    from relexio.store.write import Files

    real = Files.write

    def late(files: Files) -> None:
        (run.steps_path / "global_step_2/vocab").write_bytes(b"another length")
        real(files)

    monkeypatch.setattr(Files, "write", late)
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", "run.zarr")
    assert done.code == 1 and "vocab: changed while it was read" in done.err and not Path("run.zarr").exists()


def record(**changes: object) -> dict[str, object]:
    shard = {"name": "model.safetensors", "size": 9, "mtime_ns": 1, "header": f"files/{'0' * 32}"}
    return {"step": 1, "source": "/x", "shards": [shard], "index": None, "side": {}, **changes}


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "model.safetensors", "/".join("a" * 33), "a//b", "x" * 256, ""]
)
def test_names_of_side_files_stay_inside(name: str) -> None:
    array = f"files/{'0' * 32}"
    assert CheckpointRecord.from_json(record(side={"a/b/c/d.json": array})).side
    with pytest.raises(ValueError):
        CheckpointRecord.from_json(record(side={name: array}))


def test_what_is_said_of_files_not_stored_is_checked() -> None:
    good = NotStored.of({"optimizer.pt": 3, "a/": 4})
    found = CheckpointRecord.from_json(record(not_stored={"files": good.files, "more": 0, "bytes": 7}))
    assert found.not_stored == good and CheckpointRecord.from_json(found.to_json()) == found
    assert CheckpointRecord.from_json(record()).to_json() == record(), "stores that say nothing of it"
    for wrong in ({"files": {"a": -1}, "more": 0, "bytes": 0}, {"files": {"a": 1}, "more": "x", "bytes": 1}):
        with pytest.raises(ValueError):
            CheckpointRecord.from_json(record(not_stored=wrong))


def test_a_file_link_out_is_refused_whatever_its_name(tmp_path: Path, run: Run) -> None:
    (tmp_path / "secret").write_text("x")
    (run.base_path / "vocab").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="a link to"):
        open_checkpoint(run.base_path)
    (run.base_path / "vocab").unlink()
    (run.base_path / "optimizer.pt").symlink_to(tmp_path / "secret")
    assert open_checkpoint(run.base_path).not_stored() == {"optimizer.pt": 1}, "what is not stored is no danger"


def test_damage_in_a_stored_file_leaves_no_output(tmp_path: Path, run: Run) -> None:
    store = store_run(run, tmp_path / "run.zarr")
    name = store.record(2).side["vocab"]
    (tmp_path / "run.zarr" / name / "c/0").unlink()
    with pytest.raises(StoreError):
        restore(store, 2, tmp_path / "back", CPU, silent)
    assert not list(tmp_path.glob("back*"))
