"""relexio killed at random moments, and at each of its writes; for tools/attack/reliability.py."""

import builtins
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr.storage._local as zarr_local
from safetensors.numpy import save_file

from relexio import atomic
from relexio.cli.main import main as command_line
from relexio.verbs import (
    convert,  # noqa: F401  so that copies of this process need not
    inspect,  # noqa: F401  so that copies of this process need not
    predict,  # noqa: F401  so that copies of this process need not
)
from relexio.verbs.convert import merge

#: Calls that change the disk, besides those that write bytes.
CALLS = ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync", "posix_fallocate")
#: Two blocks of 65,536 elements, the second of which tensors share.
SHAPES = {
    "model.embed_tokens.weight": (90, 40),
    "model.layers.0.w": (300, 250),
    "model.layers.1.w": (80, 60),
    "n": (40,),
}
Files = dict[str, bytes]


def make_run(root: Path, seed: int) -> None:
    """A base and eight steps of F16 tensors in two shards."""
    rng = np.random.default_rng(seed)
    base = {name: (rng.standard_normal(shape) / 50).astype("f2") for name, shape in SHAPES.items()}
    drift = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    for step, folder in ((0, root / "base"), *((n, root / f"steps/global_step_{n}") for n in range(1, 9))):
        folder.mkdir(parents=True)
        now = {name: (base[name] + step * 5e-6 * drift[name]).astype("f2") for name in base}
        files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
        for i, file in enumerate(files):
            save_file({name: now[name] for name in list(now)[i::2]}, folder / file, {"format": "pt"})
        where = {name: files[i % 2] for i, name in enumerate(now)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (folder / "config.json").write_text(json.dumps({"model_type": "none", "step": step}))


def arm(strike: int, half: bool) -> None:
    """Let this process kill itself before the ``strike``-th change to the disk; in the middle, if ``half``, of a write."""
    count = itertools.count(1)

    def struck(real: Callable[..., Any], middle: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if next(count) == strike:
                if middle is not None:
                    os.write(2, b"a write")
                    if half:
                        middle(*arguments, **more)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        return call

    def half_a_chunk(path: Path, value: Any, exclusive: bool = False) -> None:
        data = bytes(value.as_buffer_like())
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path.with_suffix(f".{uuid.uuid4().hex}.partial"), data[: len(data) // 2])

    def opened(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return (writing if set(mode) & set("wxa+") else plain)(file, mode, *rest, **more)

    write, pwrite, plain = Path.write_bytes, os.pwrite, builtins.open
    writing = struck(plain)
    for name in CALLS:
        setattr(os, name, struck(getattr(os, name)))
    os.pwrite = struck(pwrite, lambda fd, data, at: pwrite(fd, data[: len(data) // 2], at))
    Path.write_bytes = struck(write, lambda path, data: write(path, data[: len(data) // 2]))  # type: ignore[method-assign]  # on purpose
    zarr_local._put = struck(zarr_local._put, half_a_chunk)
    atomic.sync_tree = struck(atomic.sync_tree)
    builtins.open = opened


def run(arguments: list[Any], strike: int = 0, half: bool = False) -> tuple[int, str]:
    """The command line in a copy of this process, which has all imported: exit code or -signal, and what it said."""
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            code: Any = 99
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                if strike:
                    arm(strike, half)
                command_line([str(argument) for argument in arguments])
            except SystemExit as end:
                code = end.code or 0
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        return status, said.read()


def snapshot(directory: Path) -> Files:
    """All files below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@dataclass
class Scene:
    """A command, the store that it begins with (or none), and what has to be there when it is done, or after an earlier commit."""

    name: str
    arguments: list[Any]
    begin: Path | None
    work: Path
    between: Path | None = None
    want: dict[str, Files] = field(default_factory=dict)
    points: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def set_up(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        if self.begin is not None:
            shutil.copytree(self.begin, self.work / "run.zarr")

    def rehearse(self) -> float:
        """Run the command undisturbed, keep what it makes, and tell how long it takes with start-up."""
        self.set_up()
        begun = time.monotonic()
        subprocess.run([sys.executable, "-m", "relexio", *map(str, self.arguments)], check=True, capture_output=True)
        seconds = time.monotonic() - begun
        self.want = {path.name: snapshot(path) for path in self.work.iterdir()}
        return seconds

    def check(self, when: str) -> None:
        """Just killed: what has a final name is whole, and of the store the last commit is, byte for byte."""
        before = snapshot(self.begin) if self.begin else {}
        kept = "cache/"  # kept results may come and go
        for path in self.work.iterdir():
            found = {} if path.name.endswith(atomic.PARTIAL) else snapshot(path)
            allowed = [self.want.get(path.name, {"no such name": b""})] if found else [{}]
            if path.name == "run.zarr" and before:
                allowed = [before, *allowed, *([snapshot(self.between)] if self.between else [])]
            marker = found.get("zarr.json")
            if not any(
                marker == whole.get("zarr.json")
                and all(found.get(name) == whole[name] for name in whole if not name.startswith(kept))
                for whole in allowed
            ):
                self.problems.append(f"{self.name}, {when}: {path.name} is neither as before nor whole")

    def finish(self, when: str) -> None:
        """The same command again ends with the same bytes, and leaves nothing else behind."""
        if self.name == "predict":  # whole, as was just checked, and nothing is ever overwritten
            shutil.rmtree(self.work / "out", ignore_errors=True)
        code, said = run(self.arguments)
        found = {path.name: snapshot(path) for path in self.work.iterdir()}
        if code:
            self.problems.append(f"{self.name}, {when}: the next run ends with {code}: {said[-500:]}")
        elif found != self.want:
            unlike = [k for k in {*found, *self.want} if found.get(k) != self.want.get(k)]
            names = [n for k in unlike for n in {*found.get(k, {}), *self.want.get(k, {})}
                     if found.get(k, {}).get(n) != self.want.get(k, {}).get(n)]  # fmt: skip
            self.problems.append(f"{self.name}, {when}: after the next run other bytes in {unlike}: {names[:5]}")
        self.set_up()

    def kill_at_random(self, count: int, rng: random.Random, lasts: float) -> None:
        """Killed at random moments, start-up included; one time in three it is killed again when it goes on."""
        self.set_up()
        while self.points["killed at random"] < count:
            for _ in range(1 + (rng.random() < 1 / 3)):
                after = rng.uniform(0, lasts)
                process = subprocess.Popen(
                    [sys.executable, "-m", "relexio", *map(str, self.arguments)],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
                time.sleep(after)
                process.kill()
                self.points["killed at random"] += process.wait() == -signal.SIGKILL
                self.check(f"killed after {after:.3f} s")
            self.finish(f"killed after {after:.3f} s")

    def interrupt(self, count: int, rng: random.Random, lasts: float) -> None:
        """Ctrl-C at random moments from when relexio has begun, and Python has started: one line, 130, no traceback."""
        for _ in range(count):
            after = rng.uniform(0, lasts)
            command = [sys.executable, "-m", "relexio", *map(str, self.arguments)]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while process.poll() is None and not handles(process.pid, signal.SIGTERM):  # Python by itself does not
                time.sleep(0.001)
            time.sleep(after)
            process.send_signal(signal.SIGINT)
            said = process.communicate()[1]
            lines = [line for line in said.splitlines() if line and not line.startswith("note:")]
            if process.returncode or lines:  # else it had ended
                self.points["interrupted"] += 1
                if process.returncode != 130 or len(lines) != 1:
                    self.problems.append(
                        f"{self.name}, Ctrl-C after {after:.3f} s: {process.returncode}, {said[-500:]}"
                    )
            self.check(f"Ctrl-C after {after:.3f} s")
            self.finish(f"Ctrl-C after {after:.3f} s")

    def kill_at_writes(self, every: int) -> None:
        """Killed at every n-th change to the disk until the command has no more of them."""
        self.set_up()
        for strike in itertools.count(1, every):
            for half in (False, True):
                code, said = run(self.arguments, strike, half)
                if code != -signal.SIGKILL:
                    if code:
                        self.problems.append(f"{self.name}, strike {strike}: {said[-500:]}")
                    return
                self.points["killed in a write" if half else "killed before a change"] += 1
                self.check(f"killed at change {strike}{' half-way' * half}")
                self.finish(f"killed at change {strike}{' half-way' * half}")
                if "a write" not in said:
                    break


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process of ours that has not been waited for has a handler for a signal (Linux)."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(line.split()[1], 16) >> number - 1 & 1)


def scenes(root: Path) -> Iterator[Scene]:
    """convert, append, an append with a merge, and predict, on a run made here."""
    work, first = root / "work", ["convert", root / "steps", "--base", root / "base", "--steps", "1:4", "-o"]
    options = ["--method", "relex", "--step", 20, "-o", work / "out"]
    yield Scene("convert", [*first, work / "run.zarr"], None, work)
    for arguments in (
        [*first, root / "one.zarr"],
        ["predict", root / "one.zarr", "--method", "relex", "--step", 9, "-o", root / "nine"],
    ):
        must(arguments)
    yield Scene("append", ["convert", root / "steps", "-o", work / "run.zarr"], root / "one.zarr", work)
    for step in range(1, 8):
        base = ["--base", root / "base"] if step == 1 else []
        must(["convert", root / "steps", *base, "--steps", step, "-o", root / "seven.zarr"])
    shutil.copytree(root / "seven.zarr", root / "eight.zarr")
    with unmerged():
        must(["convert", root / "steps", "-o", root / "eight.zarr"])
    append = ["convert", root / "steps", "-o", work / "run.zarr"]
    yield Scene("append and merge", append, root / "seven.zarr", work, root / "eight.zarr")
    shutil.copytree(root / "one.zarr", root / "two.zarr")
    must(["convert", root / "steps", "-o", root / "two.zarr"])
    yield Scene("predict", ["predict", work / "run.zarr", *options], root / "two.zarr", work)


@contextmanager
def unmerged() -> Iterator[None]:
    """What is converted meanwhile stays in as many segments as it was added in."""
    real, merge.count_to_merge = merge.count_to_merge, lambda columns: 0
    yield
    merge.count_to_merge = real


def must(arguments: list[Any]) -> None:
    """Run what has to work."""
    code, said = run(arguments)
    if code:
        sys.exit(f"{arguments} ends with {code}:\n{said}")
