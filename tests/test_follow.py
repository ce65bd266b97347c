"""``convert --follow`` beside a trainer: each step is stored as soon as it is whole, and what vanishes is told."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relexio.checkpoints.layout import open_step as really_open
from relexio.errors import CheckpointError, MissingError, RequestError, StorageError
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.store.storage import LocalStorage
from relexio.verbs.convert import Conversion, Request
from relexio.verbs.convert import convert as really_convert
from relexio.verbs.convert import follow as module
from relexio.verbs.convert.follow import Added, Looked
from relexio.words import parse_duration
from tests.support.command import Relexio, in_process
from tests.support.make import Run, make_run, move, save_checkpoint
from tests.support.steps import CPU, store_run


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Trainer:
    """Writes the steps of a made-up run, whole or in part, into another directory."""

    def __init__(self, run: Run, root: Path) -> None:
        self.run, self.root = run, root

    def directory(self, step: int) -> Path:
        return self.root / f"checkpoint-{step}"

    def write(self, step: int, marked: bool = True) -> None:
        shutil.copytree(self.run.steps_path / f"global_step_{step}", self.directory(step), dirs_exist_ok=True)
        for file in self.directory(step).iterdir():
            file.touch()
        if marked:
            (self.directory(step) / "trainer_state.json").write_text("{}")

    def begin(self, step: int) -> None:
        """The weights are half there."""
        self.write(step, marked=False)
        file = next(self.directory(step).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    def remove(self, step: int) -> None:
        shutil.rmtree(self.directory(step))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "made", steps=tuple(range(1, 7)))


@pytest.fixture
def trainer(tmp_path: Path, run: Run) -> Trainer:
    return Trainer(run, tmp_path / "run")


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def following(trainer: Trainer, run: Run, tmp_path: Path) -> Callable[..., Iterator[str]]:
    """Follow, doing one deed of the trainer after each look; gives what happened, in words."""

    def go(*deeds: Callable[[], object], idle: float | None = 20, until: int | None = None) -> Iterator[str]:
        todo = list(deeds)
        request = Request(tmp_path / "run.zarr", run.base_path, trainer.root)
        for event in module.follow(request, until, idle, CPU, silent):
            if isinstance(event, Looked):
                if todo:
                    todo.pop(0)()
            elif isinstance(event, Added):
                yield f"added {', '.join(map(str, event.conversion.steps))}"
            else:
                yield event

    return go


def stored(tmp_path: Path, run: Run, *steps: int) -> None:
    """The store holds these steps, to the bit."""
    whole = (
        store_run(run, tmp_path / "whole.zarr")
        if not (tmp_path / "whole.zarr").exists()
        else open_store(tmp_path / "whole.zarr")
    )
    found = open_store(tmp_path / "run.zarr")
    assert found.steps == steps
    assert found.contents == {step: whole.contents[step] for step in steps}


def test_a_marked_step_is_taken_at_once_and_another_when_it_is_left_alone(
    following: Any, trainer: Trainer, run: Run, tmp_path: Path, clock: Clock
) -> None:
    times: dict[int, float] = {}

    def write(step: int, marked: bool) -> Callable[[], None]:
        def do() -> None:
            times[step] = clock.now
            trainer.write(step, marked)

        return do

    taken = {}
    for deeds in ([write(1, False)], [write(2, True), write(3, False)]):
        for text in following(*deeds, idle=90):
            taken[text] = clock.now
    assert 5 <= taken["added 1"] - times[1] <= 7 and taken["added 2"] - times[2] <= 1
    assert 60 <= taken["added 3"] - times[3] <= 62  # a trainer that marks its steps may mark this one, too
    stored(tmp_path, run, 1, 2, 3)


def test_what_is_half_there_waits(following: Any, trainer: Trainer, run: Run, tmp_path: Path) -> None:
    texts = [*following(lambda: trainer.begin(1), lambda: trainer.write(2), idle=90)]
    assert [text.split(":")[0] for text in texts] == ["added 2", "step 1 is not complete"]
    assert [*following(lambda: trainer.write(1))] == ["added 1"]
    stored(tmp_path, run, 1, 2)


def test_a_marker_older_than_the_weights_counts_for_nothing(
    following: Any, trainer: Trainer, run: Run, tmp_path: Path, clock: Clock
) -> None:
    """A trainer that was restarted writes into the directory of a step, where its old marker is."""

    def rewrite() -> None:
        trainer.write(1)
        os.utime(trainer.directory(1) / "trainer_state.json", (1, 1))

    began = clock.now
    assert [*following(rewrite, idle=10)] == ["added 1"]
    assert clock.now - began >= 10 + 5
    stored(tmp_path, run, 1)


@pytest.mark.parametrize("name", ["latest_checkpointed_iteration.txt", "latest_ckpt_global_step.txt"])
def test_the_file_beside_the_steps_that_names_the_last(
    following: Any, trainer: Trainer, run: Run, tmp_path: Path, clock: Clock, name: str
) -> None:
    def write() -> None:
        for step in (1, 2):
            trainer.write(step, marked=False)
        (trainer.root / name).write_text("1")

    events = following(write, idle=90)
    assert next(events) == "added 1" and clock.now < 3
    assert [*events] == ["added 2"]
    stored(tmp_path, run, 1, 2)


def test_steps_that_vanish(
    following: Any, trainer: Trainer, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they are opened; when their weights are open, and can be read to the end; before their other files are read."""

    def open_step(step: int, *rest: Any) -> Any:
        if step == 2:
            trainer.remove(step)
        return really_open(step, *rest)

    def convert(conversion: Conversion, stages: Any) -> Any:
        if 3 in conversion.steps:
            for file in trainer.directory(3).glob("*.safetensors"):
                file.unlink()
        if 4 in conversion.steps:
            trainer.remove(4)  # with its configuration, which is not kept open
        return really_convert(conversion, stages)

    monkeypatch.setattr(module, "open_step", open_step)
    monkeypatch.setattr(module, "convert", convert)
    texts = [*following(*[lambda step=step: trainer.write(step) for step in (1, 2, 3, 4, 5)])]
    assert texts == [
        "added 1",
        "step 2 changed or vanished before it could be read",
        "added 3",
        "step 4 changed or vanished while being read",
        "added 5",
    ]
    stored(tmp_path, run, 1, 3, 5)


def test_a_step_that_is_written_again(following: Any, trainer: Trainer, run: Run, tmp_path: Path) -> None:
    assert [*following(*[lambda step=step: trainer.write(step) for step in (1, 2, 3)])] == [
        "added 1",
        "added 2",
        "added 3",
    ]
    assert [*following(lambda: trainer.write(2))] == []  # the same bits
    again = move(run.base, [2, 3], seed=5)
    for step, tensors in again.items():
        save_checkpoint(trainer.directory(step), tensors)
        (trainer.directory(step) / "trainer_state.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"step 2 .*other bits than .* holds .* --replace 2:, then follow again"
    ) as told:
        [*following()]
    stored(tmp_path, run, 1, 2, 3)
    command = str(told.value).split("run relexio ")[1].split(", then")[0]
    assert in_process(*command.split()).code == 0
    assert [*following()] == []
    assert open_store(tmp_path / "run.zarr").steps == (1, 2, 3)
    assert open_store(tmp_path / "run.zarr").contents[2] != open_store(tmp_path / "whole.zarr").contents[2]


def test_it_ends_with_a_step_or_when_nothing_comes(
    following: Any, trainer: Trainer, run: Run, tmp_path: Path, clock: Clock
) -> None:
    deeds = [lambda step=step: trainer.write(step) for step in (1, 2)]
    assert [*following(*deeds, until=2, idle=None)] == ["added 1", "added 2"]
    began = clock.now
    assert [*following(idle=100, until=9)] == [] and 100 <= clock.now - began <= 102
    assert [*following(until=2, idle=None)] == []  # it is there already


def test_a_directory_with_no_weights_that_can_be_read_is_told(
    following: Any, trainer: Trainer, run: Run, tmp_path: Path
) -> None:
    def write() -> None:
        trainer.directory(1).mkdir(parents=True)
        (trainer.directory(1) / "model.pt").write_bytes(b"x")

    (text,) = following(write, idle=100)
    assert text.startswith("step 1 is left out: ") and "torch files that are not named pytorch_model*.bin" in text


def test_a_torch_file_without_its_end_is_waited_for(following: Any, trainer: Trainer, run: Run, tmp_path: Path) -> None:
    def write() -> None:
        trainer.directory(1).mkdir(parents=True)
        (trainer.directory(1) / "pytorch_model.bin").write_bytes(b"PK")

    (text,) = following(write, idle=100)
    assert text.startswith("step 1 is not complete: ") and "pytorch_model.bin: truncated" in text


def test_a_disk_that_is_full_and_has_room_again(
    following: Any, trainer: Trainer, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = LocalStorage.put
    calls: list[int] = []

    def full(*given: Any) -> None:
        calls.append(1)
        if len(calls) > 25:
            raise OSError(28, "No space left on device", str(tmp_path))
        put(*given)

    monkeypatch.setattr(LocalStorage, "put", full)
    with pytest.raises(StorageError, match="free space on its disk"):
        [*following(*[lambda step=step: trainer.write(step) for step in (1, 2, 3, 4, 5, 6)])]
    monkeypatch.setattr(LocalStorage, "put", put)
    [*following(lambda: trainer.write(6))]
    assert [*open_store(tmp_path / "run.zarr").steps] == sorted(int(p.name[11:]) for p in trainer.root.iterdir())
    stored(tmp_path, run, *open_store(tmp_path / "run.zarr").steps)


def test_a_step_that_is_the_base_is_left_out(following: Any, trainer: Trainer, run: Run, tmp_path: Path) -> None:
    """As while the learning rate warms up from 0."""

    def write() -> None:
        save_checkpoint(trainer.directory(1), run.base)
        (trainer.directory(1) / "trainer_state.json").write_text("{}")

    texts = [*following(write, *[lambda step=step: trainer.write(step) for step in (2, 3)])]
    assert texts == ["step 1 is the base itself (bit for bit), and left out", "added 2", "added 3"]
    stored(tmp_path, run, 2, 3)


def test_shards_that_come_one_by_one_wait_for_their_index(
    following: Any, trainer: Trainer, run: Run, tmp_path: Path, clock: Clock
) -> None:
    save_checkpoint(tmp_path / "sharded", run.steps[2], shards=2)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]

    def write(name: str) -> Callable[[], None]:
        def do() -> None:
            trainer.directory(2).mkdir(exist_ok=True)
            shutil.copy(tmp_path / "sharded" / name, trainer.directory(2))
            clock.sleep(7)

        return do

    texts = [*following(lambda: trainer.write(1), *map(write, names), idle=120)]
    assert texts[0] == "added 1" and texts[-1] == "added 2"
    stored(tmp_path, run, 1, 2)


def test_a_directory_that_may_not_be_read_stops_nothing(
    following: Any, trainer: Trainer, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path) -> bool:
        if "checkpoint-2" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return path.exists() and not path.is_file()

    monkeypatch.setattr(Path, "is_dir", closed)
    texts = [*following(*[lambda step=step: trainer.write(step) for step in (1, 3)], idle=60)]
    assert texts[:2] == ["added 1", "added 3"]


def test_what_no_waiting_would_mend_is_told_at_once(following: Any, trainer: Trainer, run: Run, tmp_path: Path) -> None:
    trainer.root.write_text("a file")
    with pytest.raises(MissingError):
        next(following())
    trainer.root.unlink()
    trainer.write(1)
    nested = Trainer(run, trainer.directory(1) / "checkpoint-5")
    nested.write(1)
    wrong = Request(tmp_path / "run.zarr", run.base_path, tmp_path)
    texts = [event for event in module.follow(wrong, None, 0, CPU, silent) if isinstance(event, str)]
    assert len(texts) == 1 and "did you mean" in texts[0]
    for request in (
        Request(tmp_path / "run.zarr", None, trainer.root),
        Request(tmp_path / "run.zarr", tmp_path / "no", trainer.root),
    ):
        with pytest.raises((RequestError, MissingError)):
            next(module.follow(request, None, 0, CPU, silent))


def test_what_the_command_line_says(trainer: Trainer, run: Run, tmp_path: Path, relexio: Relexio) -> None:
    trainer.write(1)
    out = tmp_path / "run.zarr"
    done = relexio("convert", trainer.root, "--base", run.base_path, "-o", out, "--follow", "--until", 1)
    assert done.code == 0
    assert done.err.splitlines()[-1].startswith("step 1 stored: 1 in ")
    assert f"relexio backtest {out}" in done.out and "holds       step 1\n" in done.out
    for step in range(2, 7):
        trainer.write(step)
    done = relexio("convert", trainer.root, "-o", out, "--follow", "--idle", "1s", "--json")
    assert "verdict: " in done.err and '"steps": [1, 2, 3, 4, 5, 6]' in done.out
    done = relexio(
        "convert", tmp_path / "nothing", "-o", tmp_path / "no.zarr", "--base", run.base_path, "--follow", "--idle", 0
    )
    assert (done.code, done.out) == (1, "") and "Traceback" not in done.err
    assert done.err.splitlines()[1].startswith(f"error: {tmp_path / 'nothing'}: no step was whole by then")
    for options in (
        ["--until", 3],
        ["--idle", "1m"],
        ["--follow", "--verify"],
        ["--follow", "--dry-run"],
        ["--keep", "last:1"],
    ):
        assert relexio("convert", trainer.root, "-o", out, *options).code == 2
    with pytest.raises(RequestError, match="write 90s, 30m or 2h"):
        parse_duration("soon")
    assert [parse_duration(text) for text in ("90", "90s", "1.5m", "2h")] == [90, 90, 90, 7200]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_at_once_when_it_is_told_to(trainer: Trainer, run: Run, tmp_path: Path, number: int) -> None:
    trainer.write(1)
    command = ["convert", trainer.root, "--base", run.base_path, "-o", tmp_path / "run.zarr", "--follow"]
    process = subprocess.Popen(
        [sys.executable, "-m", "relexio", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run.zarr").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert err.splitlines()[-1].startswith("interrupted:") and "Traceback" not in err
    stored(tmp_path, run, 1)
    command[-1:] = ["--follow", "--until", "2"]
    trainer.write(2)
    assert in_process(*command).code == 0
    stored(tmp_path, run, 1, 2)


@pytest.mark.slow
def test_killed_again_and_again_no_step_is_lost(tmp_path: Path) -> None:
    """docs/reliability.md has a long run."""
    tool = Path(__file__).parents[1] / "tools" / "attack" / "following.py"
    done = subprocess.run(
        [sys.executable, tool, "--kills", "3", "--scratch", tmp_path], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0 and done.stdout.count("missing none, wrong none") == 2, done.stdout + done.stderr
