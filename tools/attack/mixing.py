"""A store into which parts of a sibling came, restored: what comes back is right or refused; for tools/attack/reliability.py."""

import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from os import utime
from pathlib import Path

import numpy as np
from killing import Files, snapshot
from safetensors.numpy import save_file

Command = Callable[..., tuple[int, str, str]]
#: The ways in which stores are mixed.
WAYS = ("cut off", "some chunks", "one block", "another block", "a segment", "a table")
SHAPES = {"model.embed_tokens.weight": (300, 240), "w": (240, 300), "v": (240, 300), "half": (48, 50), "n": (90, 90)}
#: Blocks of the float32 tensors: 65,536 elements each.
BLOCKS = 4
STEPS = (1, 2, 3, 5)
_TIME = (10**18, 10**18)


def _write(root: Path, seed: int) -> dict[str, Files]:
    """A base that is always the same, and steps that are the seed's own, under the same paths with the same times."""
    rng, own = np.random.default_rng(0), np.random.default_rng(seed)
    base = {
        name: (rng.standard_normal(shape) / 50).astype("f2" if name == "half" else "f4")
        for name, shape in SHAPES.items()
    }
    drift = {name: own.standard_normal(shape) * (own.random(shape) < 0.2) for name, shape in SHAPES.items()}
    written = {}
    for step in (0, *STEPS):
        folder = root / "steps" / f"step_{step}" if step else root / "base"
        folder.mkdir(parents=True, exist_ok=True)
        now = {name: (value + step * 1e-3 * drift[name]).astype(value.dtype) for name, value in base.items()}
        save_file(now, folder / "model.safetensors", {"format": "pt"})
        utime(folder / "model.safetensors", ns=_TIME)
        written[str(step) if step else "base"] = snapshot(folder)
    return written


class Mixing:
    """Two runs from one base that differ in nothing but their steps' bits; parts of one store go over the other."""

    def __init__(self, root: Path, command: Command, seed: int) -> None:
        self.root, self.command, self.rng = root, command, random.Random(seed)
        self.points: Counter[str] = Counter()
        self.problems: list[str] = []
        self.runs, self.stores = [], []
        for number in (1, 2):
            self.runs.append(_write(root, number))
            store = root / f"run-{number}.zarr"
            for steps in ("1:3", "5"):
                base = [] if store.exists() else ["--base", root / "base"]
                code, _, said = command("convert", root / "steps", *base, "--steps", steps, "-o", store)
                if code:
                    sys.exit(said)
            self.stores.append(snapshot(store))

    def _taken(self, way: str) -> Files:
        """What of the sibling, or of another place, goes over the store."""
        ours, theirs = self.stores
        chunks = sorted(name for name in theirs if "/c/" in name)
        if way == "cut off":  # a copy in one order or another, the last file perhaps half
            names = sorted(theirs)
            self.rng.choice((lambda: None, names.reverse, lambda: self.rng.shuffle(names)))()
            some = names[: self.rng.randrange(1, len(names))]
            data = theirs[some[-1]]
            return {n: theirs[n] for n in some} | {some[-1]: data[: self.rng.choice((len(data), len(data) // 2))]}
        if way == "some chunks":
            return {name: theirs[name] for name in self.rng.sample(chunks, self.rng.randrange(1, 6))}
        if way == "a segment":
            segments = ("segments/0000/", "segments/0001/")
            name = self.rng.choice((*segments, *(f"{segment}f32/" for segment in segments), "segments/"))
            return {n: data for n, data in theirs.items() if n.startswith(name)}
        if way == "a table":
            name = self.rng.choice(("zarr.json", "digest", "index", "hashes", "changed"))
            return {n: data for n, data in theirs.items() if n == name or f"/{name}/c/" in n}
        segment, one, other = (f"segments/000{self.rng.randrange(2)}/f32", *self.rng.sample(range(BLOCKS), 2))
        held, where = (theirs, one) if way == "one block" else (ours, other)
        moved = {f"{segment}/{name}/c/{where}": held[f"{segment}/{name}/c/{one}"] for name in ("when", "by")}
        tables = [f"{segment}/{name}" for name in ("index/c/0/0", "hashes/c/0", "digest/c/0/0/0")]
        return moved | {name: held[name] for name in tables if self.rng.random() < 0.8}

    def once(self) -> None:
        """Mix, restore every step, and see what came."""
        store, out, way = self.root / "mixed.zarr", self.root / "out", self.rng.choice(WAYS)
        ours, theirs = self.stores
        mixed = {**ours, **self._taken(way)}
        for name, data in mixed.items():
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            (store / name).write_bytes(data)
        right = self.runs[mixed["zarr.json"] == theirs["zarr.json"]]  # the marker says which run it is
        for step, files in right.items():
            code, _, said = self.command("restore", store, "--step", step, "-o", out)
            if code == 1 and said.count("error:") == 1 and "Traceback" not in said and not out.exists():
                self.points[f"{way}: refused"] += 1
            elif code == 0 and snapshot(out) == files:
                self.points[f"{way}: exactly right"] += 1
            else:
                what = "a checkpoint that never was" if code == 0 else f"{code}: {said[-400:]}"
                self.problems.append(f"restore of step {step} after {way}: {what}")
            shutil.rmtree(out, ignore_errors=True)
        self.points[way] += 1
        shutil.rmtree(store)


def mix(root: Path, command: Command, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Mix two stores ``count`` times: what came of it, and each restore that was silently wrong."""
    root.mkdir()
    tried = Mixing(root, command, seed)
    for _ in range(count):
        tried.once()
    return tried.points, tried.problems
