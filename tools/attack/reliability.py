"""Tries to lose data: relexio is killed at random and at each of its writes, and what it stored is damaged.

usage: python tools/attack/reliability.py [--kills N] [--every N] [--interrupts N] [--flips N] [--mixes N] [--seed S]
                                   [--scratch DIR] [--json FILE]

--kills: how often each of convert, convert to append, with a merge too, and predict is killed at a random moment. --every: each is
killed at every N-th call that changes the disk too (0: none), before it, and where it writes, also when half is
written. --interrupts: how often each gets Ctrl-C. --flips: how many damages. --mixes: how often
parts of a sibling's store, or of another place, are copied over a store of which then each step is restored. Prints a
table (docs/reliability.md explains it). Ends with 1 if anything was lost.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from killing import make_run, must, scenes, snapshot
from mixing import mix

from relexio.cli.main import main as command_line

OPTIONS = (("--kills", 100), ("--every", 1), ("--interrupts", 20), ("--flips", 1000), ("--mixes", 200), ("--seed", 0))


def in_process(*arguments: object) -> tuple[int, str, str]:
    """The command line in this process: exit code (99: a traceback), stdout, stderr."""
    code: Any = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            command_line([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code or 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            code = 99
    return code, out.getvalue(), err.getvalue()


def damaged(data: bytes, how: str, rng: random.Random) -> bytes | None:
    """The bytes of a file after one damage; None where it is gone."""
    at = rng.randrange(len(data))
    if how == "bit":
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if how == "byte":
        return data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]
    return data[:at] if how == "cut off" else None


class Damage:
    """A whole store with kept results, damaged in one place at a time."""

    def __init__(self, store: Path, seed: int) -> None:
        self.store, self.rng = store, random.Random(seed)
        self.out = store.with_name(f"{store.name}-out")
        self.whole = snapshot(store)
        self.points: Counter[str] = Counter()
        self.problems: list[str] = []
        self.right = [self.look(verb) for verb in ("predict", "inspect")]
        assert None not in self.right and in_process("verify", store)[0] == 0

    def look(self, verb: str) -> Any:
        """What a prediction or ``inspect`` gives; None if it is refused in one clear line."""
        shutil.rmtree(self.out, ignore_errors=True)
        options = ["--method", "relex", "--step", 20, "-o", self.out] if verb == "predict" else ["--json"]
        code, text, err = in_process(verb, self.store, *options)
        out: Any = text
        if code == 1 and err.count("error:") == 1 and "Traceback" not in err and not self.out.exists():
            return None
        if verb == "inspect" and code == 0:
            sizes = ("bytes", "compression")  # of the files as they are, damaged or not
            out = {name: value for name, value in json.loads(text).items() if name not in sizes}
        return (code, out, snapshot(self.out) if self.out.exists() else {})

    def damage(self, how: str) -> list[str]:
        """Damage a file, or two; their names."""
        names = sorted(self.whole)
        new: list[bytes | None]
        name = self.rng.choice(names)
        if how == "swapped":
            kinds = (lambda n: len(self.whole[n]), lambda n: n.split("/c/")[0])  # of one size, or of one array
            alike = self.rng.choice(kinds)
            pairs = [(a, b) for a, b in itertools.combinations(names, 2)
                     if alike(a) == alike(b) and self.whole[a] != self.whole[b]]  # fmt: skip
            hit = list(self.rng.choice(pairs))
            new = [self.whole[name] for name in reversed(hit)]
        else:
            hit, new = [name], [damaged(self.whole[name], how, self.rng)]
        for name, data in zip(hit, new, strict=True):
            (self.store / name).write_bytes(data or b"")
            if data is None:
                (self.store / name).unlink()
        return hit

    def once(self) -> None:
        how = self.rng.choice(("bit", "bit", "byte", "cut off", "deleted", "swapped", "swapped"))
        hit = self.damage(how)
        self.points[how] += 1
        code, _, err = in_process("verify", self.store)
        said = err.replace(": chunk ", "/").replace(": ", "/")
        named = any(str(self.store / name.removesuffix("/zarr.json").split("/c/")[0]) in said for name in hit)
        named |= hit == ["zarr.json"] and "it has no zarr.json" in said
        if code != 1 or "Traceback" in err or not named:
            self.problems.append(f"{how} {hit}: verify ends with {code}: {err[-400:]}")
        for verb, right in zip(("predict", "inspect"), self.right, strict=True):
            found = self.look(verb)
            if found is None or found == right:
                self.points[f"{verb}: {'refused' if found is None else 'exactly right'}"] += 1
            else:
                self.problems.append(f"{how} {hit}: {verb} gives something else: {found[:2]}")
        for name in hit:
            (self.store / name).write_bytes(self.whole[name])


def flips(store: Path, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Damage a copy of a store ``count`` times; in other processes, since the threads of this work outlive it."""
    children, cores = [], min(count, os.cpu_count() or 1)
    for i in range(cores):
        mine, answer = store.with_name(f"flips-{i}.zarr"), store.with_name(f"flips-{i}.json")
        if (pid := os.fork()) == 0:
            shutil.copytree(store, mine)
            tried = Damage(mine, seed + i)
            for _ in range(i, count, cores):
                tried.once()
            answer.write_text(json.dumps([tried.points, tried.problems]))
            os._exit(0)
        children.append((pid, answer))
    points, problems = Counter[str](), list[str]()
    for pid, answer in children:
        if os.waitpid(pid, 0)[1]:
            sys.exit("a process that damages stores has failed")
        more, wrong = json.loads(answer.read_text())
        points, problems = points + Counter(more), problems + wrong
    return points, problems


def measure(root: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run everything: what --json writes."""
    make_run(root, chosen.seed)
    rows, problems, rng = [], [], random.Random(chosen.seed)
    for scene in scenes(root):
        lasts = scene.rehearse()
        if chosen.every:
            scene.kill_at_writes(chosen.every)
        scene.kill_at_random(chosen.kills, rng, lasts)
        scene.interrupt(chosen.interrupts, rng, lasts)
        rows += [[f"{scene.name}, {how}", count] for how, count in scene.points.items()]
        problems += scene.problems
    if chosen.flips:
        must(["predict", root / "two.zarr", "--method", "relex", "--step", 9, "-o", root / "ten"])
        points, wrong = flips(root / "two.zarr", chosen.flips, chosen.seed)
        rows += [[f"damage, {how}", count] for how, count in sorted(points.items())]
        problems += wrong
    if chosen.mixes:
        points, wrong = mix(root / "mixes", in_process, chosen.mixes, chosen.seed)
        rows += [[f"restore, {how}", count] for how, count in sorted(points.items())]
        problems += wrong
    return {"options": vars(chosen), "rows": rows, "problems": problems}


def main() -> None:
    """Run it all, print the table, say what was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in OPTIONS:
        parser.add_argument(name, type=int, default=default)
    for name in ("--scratch", "--json"):
        parser.add_argument(name)
    chosen = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="relexio-reliability-", dir=chosen.scratch) as scratch:
        found = measure(Path(scratch), chosen)
    found["seconds"] = round(time.monotonic() - begun)
    print("| what was done | times |\n|---|---|")
    print("\n".join(f"| {what} | {count:,} |" for what, count in found["rows"]))
    print(f"\n{len(found['problems'])} problems, {found['seconds']} s")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(found, indent=1) + "\n")
    for problem in found["problems"][:20]:
        print(f"problem: {problem}", file=sys.stderr)
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
