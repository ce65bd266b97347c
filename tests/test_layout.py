"""Which directories are checkpoints of which step, and which of them the user asked for."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.checkpoints.layout import choose, find_steps, model_directory
from relexio.checkpoints.trainers import TRAINERS, Trainer, trainer_of
from relexio.errors import CheckpointError, MissingError, RequestError
from relexio.words import parse_steps
from tests.support.command import Relexio, in_turn, snapshot
from tests.support.make import Run, load_file, make_run, save_checkpoint

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
TENSORS = {"w": np.arange(4, dtype=np.float32)}
INSIDE = ["", "huggingface", "actor/huggingface", "actor", "lora_adapter", "actor/lora_adapter", "policy/lora_adapter"]

Spoil = Callable[[Path], object]


def checkpoints(root: Path, *names: str) -> Path:
    for name in names:
        save_checkpoint(root / name, TENSORS)
    return root


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, steps=(2, 10), shapes={"embed": (6, 5), "norm": (5,), "head": (2, 2)})


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize(
    "name",
    ["global_step_{}", "global_step{}", "global_step{}_hf", "global_step_{}_hf", "checkpoint-{}", "step_{}", "step-{}"],
)
def test_step_directories_are_found_by_name(tmp_path: Path, name: str, inside: str) -> None:
    wanted = {step: tmp_path / name.format(step) / inside for step in (0, 5, 120)}
    for path in wanted.values():
        save_checkpoint(path, TENSORS)
    assert find_steps(tmp_path) == (wanted, [])


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("inside", INSIDE)
def test_weights_are_found_inside_a_step_directory(tmp_path: Path, inside: str, shards: int) -> None:
    save_checkpoint(tmp_path / inside, {"a": np.zeros(2, np.float32), "b": np.ones(2, np.float32)}, shards)
    (tmp_path / "actor" / "lora_adapter").mkdir(parents=True, exist_ok=True)
    (tmp_path / "actor" / "model_world_size_2_rank_0.pt").touch()
    assert model_directory(tmp_path) == tmp_path / inside


def test_a_directory_with_only_a_config_does_not_hide_the_weights_beside_it(tmp_path: Path) -> None:
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "config.json").write_text("{}")
    save_checkpoint(tmp_path / "actor" / "huggingface", TENSORS)
    assert model_directory(tmp_path) == tmp_path / "actor" / "huggingface"


@pytest.mark.parametrize(
    "name",
    [
        *["best", "best_5", "best_global_step_5", "best-checkpoint-5", "latest", "latest_5", "latest_global_step_5"],
        *["global_step_", "global_step_x", "global_step_-5", "global_step_5.tmp", "global_step_5_old", "step_1.5", "5"],
        *["Step_5", "epoch_5", "checkpoint_5", "steps_5", "step_5_hf_2", "step_" + "9" * 16, "²", "10²", "run-①", " "],
    ],
)
def test_other_directories_are_left_out_and_told(tmp_path: Path, name: str) -> None:
    checkpoints(tmp_path, "global_step_7", name)
    assert find_steps(tmp_path) == ({7: tmp_path / "global_step_7"}, [name])


def test_files_are_no_step_directories(tmp_path: Path) -> None:
    checkpoints(tmp_path, "step_1")
    (tmp_path / "step_2").write_text("not a directory")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    assert find_steps(tmp_path) == ({1: tmp_path / "step_1"}, [])


def test_steps_are_sorted_as_numbers_whatever_their_names(tmp_path: Path) -> None:
    checkpoints(tmp_path, "step_10", "step_9", "checkpoint-100", "global_step_2_hf", "step-1000", "global_step_075")
    assert list(find_steps(tmp_path)[0]) == [2, 9, 10, 75, 100, 1000]


def test_a_linked_step_directory_counts(tmp_path: Path) -> None:
    elsewhere = save_checkpoint(tmp_path / "elsewhere", TENSORS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step_4").symlink_to(elsewhere)
    assert find_steps(tmp_path / "run")[0] == {4: tmp_path / "run" / "step_4"}


@pytest.mark.parametrize("other", ["step_5", "global_step5", "checkpoint-5", "global_step_05", "global_step_5_hf"])
def test_two_directories_for_one_step_are_refused_by_name(tmp_path: Path, other: str) -> None:
    checkpoints(tmp_path, "global_step_5", other, "global_step_6")
    with pytest.raises(CheckpointError, match="two directories for step 5") as error:
        find_steps(tmp_path)
    assert str(tmp_path / "global_step_5") in str(error.value)
    assert str(tmp_path / other) in str(error.value)
    assert list(find_steps(tmp_path, parse_steps("6"))[0]) == [6]


def test_a_step_found_and_named_is_refused(tmp_path: Path) -> None:
    checkpoints(tmp_path, "step_5", "elsewhere")
    with pytest.raises(CheckpointError, match="two directories for step 5"):
        choose(tmp_path, {5: tmp_path / "elsewhere"}, None)


@pytest.mark.parametrize("root", ["absent", "file"])
def test_a_root_that_is_no_directory_is_missing(tmp_path: Path, root: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MissingError, match=root):
        find_steps(tmp_path / root)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("5", [5]),
        ("0", [0]),
        ("1:4", [1, 2, 3, 4]),
        ("4:4", [4]),
        ("10:30:10", [10, 20, 30]),
        ("10:35:10", [10, 20, 30]),
        ("1,2,5", [1, 2, 5]),
        (" 1 , 3:4 ", [1, 3, 4]),
        ("5,1:3,2", [1, 2, 3, 5]),
        ("007", [7]),
        ("36:999999999999999", [36, 37, 38, 39, 40]),
    ],
)
def test_step_expressions_include_both_ends(text: str, steps: list[int]) -> None:
    selection = parse_steps(text)
    assert [step for step in range(41) if step in selection] == steps
    assert selection.text == text


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            " ",
            ",",
            "1,",
            ",1",
            "1,,2",
            "a",
            ":5",
            "1:2:3:4",
            "1:5:",
            "-1",
            "1:-1",
            "1.5",
            "1-5",
            "1;5",
        ],
        *["1 2", "1 :5", "0x5", "1e3", "+1", "1_000", "²", "1" * 16, "1\n2", "all", "\x00"],
    ],
)
def test_what_is_no_step_expression_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(RequestError, match="write 1:75, 10:300:10 or 1,2,5"):
        parse_steps(text)


@pytest.mark.parametrize("text", ["5:1", "1:5:0", "1,9:8", "0:0:0"])
def test_an_empty_range_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="holds no step"):
        parse_steps(text)


@pytest.mark.parametrize(
    ("text", "chosen"), [("1:9", [2, 5]), ("5:99", [5, 10]), ("0:10:10", [10]), ("10,2", [2, 10]), ("2,4:6", [2, 5])]
)
def test_ranges_take_what_is_there(tmp_path: Path, text: str, chosen: list[int]) -> None:
    checkpoints(tmp_path, "step_2", "step_5", "step_10")
    assert list(choose(tmp_path, {}, parse_steps(text))[0]) == chosen


@pytest.mark.parametrize(
    ("text", "says"), [("3", "3"), ("2,3,4", "3, 4"), ("7:7", "7"), ("6:9", "among the steps 6:9")]
)
def test_a_step_that_is_named_and_not_there_is_refused(tmp_path: Path, text: str, says: str) -> None:
    checkpoints(tmp_path, "step_2", "step_5")
    with pytest.raises(RequestError, match=f"^{tmp_path}: no checkpoint .*{says}"):
        choose(tmp_path, {}, parse_steps(text))


def test_a_directory_without_steps_is_refused_with_the_names_that_count(tmp_path: Path) -> None:
    checkpoints(tmp_path, "best_5")
    with pytest.raises(RequestError, match="global_step_N") as error:
        choose(tmp_path, {}, None)
    assert str(tmp_path) in str(error.value)


def test_a_named_step_that_is_missing_is_told_without_a_root(tmp_path: Path) -> None:
    checkpoints(tmp_path, "elsewhere")
    with pytest.raises(RequestError, match="no checkpoint for step 6") as error:
        choose(None, {5: tmp_path / "elsewhere"}, parse_steps("5,6"))
    assert "None" not in str(error.value)


def test_named_checkpoints_join_those_found_in_order(tmp_path: Path) -> None:
    checkpoints(tmp_path / "run", "step_2", "step_10")
    odd = save_checkpoint(tmp_path / "final" / "actor" / "huggingface", TENSORS)
    steps, _ = choose(tmp_path / "run", {4: tmp_path / "final"}, None)
    assert steps == {2: tmp_path / "run" / "step_2", 4: odd, 10: tmp_path / "run" / "step_10"}
    assert list(steps) == [2, 4, 10]


def sharded(change: Callable[[Any], object]) -> Spoil:
    """The same checkpoint in two shards, with the weight map of its index changed."""

    def spoil(c: Path) -> None:
        tensors = load_file(c / FILE)
        (c / FILE).unlink()
        save_checkpoint(c, tensors, shards=2)
        index = json.loads((c / INDEX).read_text())
        change(index["weight_map"])
        (c / INDEX).write_text(json.dumps(index))

    return spoil


def only(name: str = "config.json") -> Spoil:
    """A config and an empty file in the place of the weights."""
    return in_turn(
        lambda c: (c / FILE).unlink(),
        lambda c: (c / name).parent.mkdir(exist_ok=True),
        lambda c: (c / name).touch(),
    )


#: What can be wrong with the files of one directory, and words that the error must hold.
FAULTS: dict[str, tuple[Spoil, list[str]]] = {
    "a config and no weights": (only(), ["a config and no weights"]),
    "a shard without end": (only("actor/model_world_size_8_rank_0.pt"), ["/actor"]),
    "a LoRA adapter": (only("adapter_model.safetensors"), ["adapter"]),
    "a LoRA adapter of torch": (only("adapter_model.bin"), ["LoRA", "save_file"]),
    "a DCP checkpoint": (only("dcp/__0_0.distcp"), ["DCP"]),
    "a torch file without end": (only("pytorch_model.bin"), ["pytorch_model.bin: truncated"]),
    "torch files of other names": (only("model.pt"), ["mv ", "pytorch_model.bin"]),
    "an index and a single file": (lambda c: (c / INDEX).write_text("{}"), [FILE, INDEX]),
    "two files and no index": (in_turn(sharded(len), lambda c: (c / INDEX).unlink()), ["2 safetensors files", INDEX]),
    "an index that is no JSON": (in_turn(only(INDEX), lambda c: (c / INDEX).write_bytes(b"\xff")), [INDEX, "JSON"]),
    "an index without map": (in_turn(only(INDEX), lambda c: (c / INDEX).write_text("{}")), [INDEX, "weight_map"]),
    "a missing shard": (in_turn(sharded(len), lambda c: (c / SHARDS[1]).unlink()), [SHARDS[1], "missing"]),
    "a shard above": (sharded(lambda m: m.update(norm="../a.safetensors")), [INDEX, "'../a.safetensors'"]),
    "a shard elsewhere": (sharded(lambda m: m.update(norm="/etc/passwd")), [INDEX, "'/etc/passwd'"]),
    "a shard without name": (sharded(lambda m: m.update(norm="")), [INDEX]),
    "a shard with a long name": (sharded(lambda m: m.update(norm="m" * 300)), ["mmm"]),
    "a shard that is a number": (sharded(lambda m: m.update(norm=1)), [INDEX, "weight_map"]),
    "a tensor that no shard holds": (sharded(lambda m: m.update(ghost=SHARDS[0])), [INDEX, "ghost"]),
    "a tensor in another shard": (sharded(lambda m: m.update(head=SHARDS[1])), [INDEX, "head"]),
    "a tensor that the index lacks": (sharded(lambda m: m.pop("head")), [INDEX, "head"]),
}


#: Those with no weights that can be read: one such step does not stop a run.
GONE = ["a config and no weights", "a LoRA adapter of torch", "a DCP checkpoint", "torch files of other names"]


@pytest.mark.parametrize("fault", GONE)
def test_a_step_without_weights_that_can_be_read_is_left_out(
    run: Run, relexio: Relexio, tmp_path: Path, fault: str
) -> None:
    spoil, says = FAULTS[fault]
    spoil(run.steps_path / "global_step_2")
    command = ("convert", run.steps_path, "--base", run.base_path, "-o", tmp_path / "traj")
    done = relexio(*command, "--steps", "2,10")
    assert done.code == 1 and not (tmp_path / "traj").exists()  # it was asked for
    done = relexio(*command, "--json")
    assert done.code == 0 and 2 not in json.loads(done.out)["added"]
    (line,) = done.err.splitlines()
    assert line.startswith(f"note: step 2 is left out: {run.steps_path / 'global_step_2'}")
    assert not [word for word in says if word not in line], line


@pytest.mark.parametrize("where", ["base", "steps/global_step_2"])
@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_make_no_model_are_refused(
    run: Run, relexio: Relexio, tmp_path: Path, fault: str, where: str
) -> None:
    if fault in GONE and where != "base":
        for step in run.steps:  # where none is left, nothing can be done
            shutil.rmtree(run.steps_path / f"global_step_{step}") if step != 2 else None
    spoil, says = FAULTS[fault]
    spoil(tmp_path / where)
    before = snapshot(tmp_path)
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", tmp_path / "traj")
    (line,) = done.err.splitlines()
    assert (done.code, line[: 7 + len(f"{tmp_path / where}")]) == (1, f"error: {tmp_path / where}")
    assert not [word for word in says if word not in line], line
    assert (snapshot(tmp_path), list(tmp_path.glob("traj*"))) == (before, [])


@pytest.mark.parametrize("trainer", TRAINERS, ids=[trainer.name for trainer in TRAINERS])
def test_directories_of_trainers(run: Run, tmp_path: Path, trainer: Trainer) -> None:
    name = re.sub(r"_hf\)\?$|\(\?:", "", trainer.directory).replace(r"(\d+)", f"{12 - trainer.added:06}")
    name = name.replace(r"(?!_\d+$)", "").replace(r"\d+", "3").replace("_?", "")
    inside = tmp_path / "run" / name / trainer.inside
    save_checkpoint(inside, run.steps[2])
    for name in (
        "tmp_step_12",
        "old_step_12",
        "best_global_step12",
        "best_step_12",
        "latest",
        "checkpoint-best",
        "step_",
    ):
        save_checkpoint(tmp_path / "run" / name, run.steps[2])
    found, rest = find_steps(tmp_path / "run")
    assert found == {12: inside} and len(rest) == 7
    assert trainer_of(tmp_path / "run" / inside.relative_to(tmp_path / "run").parts[0], inside) == trainer.name
    page = (Path(__file__).parents[1] / "docs" / "trainers.md").read_text()
    assert all(part in page for part in (*trainer.name.split(", "), trainer.inside, trainer.marker, trainer.beside))


def test_directories_of_any_name(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    for step in run.steps:
        save_checkpoint(tmp_path / "run" / f"iter_{step:04}_hf", run.steps[step])
    command = ("convert", tmp_path / "run", "--base", run.base_path, "-o", tmp_path / "traj")
    assert "--pattern" in relexio(*command).err
    assert relexio(*command, "--pattern", r"iter_(\d+)_hf", "--verify").code == 0
    done = relexio("verify", tmp_path / "traj", tmp_path / "run", "--pattern", r"iter_(\d+)_hf", "--json")
    assert json.loads(done.out)["compared"] == sorted(run.steps)
    for text, says in (("(", "is no pattern"), (r"iter_\d+", "one group"), (r"(i)ter_(\d+)", "one group")):
        done = relexio(*command, "--pattern", text)
        assert done.code == 2 and says in done.err


def test_convert_takes_named_checkpoints(run: Run, relexio: Relexio, tmp_path: Path) -> None:
    (run.steps_path / "global_step_10").rename(tmp_path / "a=b")
    named = ["--checkpoint", f"10={tmp_path / 'a=b'}", "--checkpoint", f"02={run.steps_path / 'global_step_2'}"]
    done = relexio("convert", *named, "--base", run.base_path, "-o", tmp_path / "traj", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["added"] == [2, 10]


def test_convert_tells_which_directories_it_leaves_out(run: Run, relexio: Relexio, tmp_path: Path) -> None:
    checkpoints(run.steps_path, "best_10", "latest")
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", tmp_path / "traj", "--json")
    assert (done.code, json.loads(done.out)["added"]) == (0, [2, 10])
    assert "best_10, latest" in done.err


def test_a_directory_of_optimizer_states_beside_the_model_is_passed_over(
    run: Run, relexio: Relexio, tmp_path: Path
) -> None:
    (run.steps_path / "global_step_2").rename(run.steps_path / "global_step2_hf")
    (run.steps_path / "global_step2").mkdir()
    (run.steps_path / "global_step2" / "optimizer.pt").write_bytes(b"state")
    done = relexio(
        "convert", run.steps_path, "--base", run.base_path, "--steps", "2:", "-o", tmp_path / "traj", "--json"
    )
    assert done.code == 0, done.err
    assert 2 in json.loads(done.out)["added"]
