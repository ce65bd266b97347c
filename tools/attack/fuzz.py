"""Hostile bytes for everything that relexio reads: one RelexioError, or nothing, may come of them.

usage: python tools/attack/fuzz.py TARGET ... [--seconds N] [--corpus DIR] [--findings DIR] [--seed N] [--coverage]

TARGET is a name in TARGETS, or all. A finding is an error of another class, a warning, 5 s, 512 MB more of memory, a signal, or
a file where none belongs; its input is written to --findings, and it is printed as one line. --coverage lets atheris, if it
is installed, choose inputs by the lines that they reach; without it they are mutations with a fixed seed.
"""

import argparse
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:
    atheris = None
if atheris and "--coverage" in sys.argv:
    with atheris.instrument_imports(include=["relexio"]):
        from fuzz_targets import TARGETS, World, good_seeds
else:
    from fuzz_targets import TARGETS, World, good_seeds

CORPUS = Path(__file__).parents[2] / "tests" / "corpus"
HANG, ROOM = 5.0, 512 << 20
NUMBERS = (0, 1, -1, 2, 3, 255, 1 << 20, 1 << 31, 1 << 40, 2**62, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e308)
TEXTS = ("", ".", "..", "../x", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J", "m" * 300, "ä\u202e", "\ud800", "c/0", "0000")
OTHERS: tuple[Any, ...] = (
    None, True, [], {}, [[]], float("nan"), float("inf"), [2**60] * 8, [1] * 100, {"": {}}, "BF16", "F64", "F4",
)  # fmt: skip
BYTES = (b"\0", b"\xff", b"\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"[" * 2000, b"NaN", b"-1", b"1e999", b'"')


class Hang(BaseException):
    """Time is up for one input."""


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The input with a few changes: of values where it is JSON behind a few bytes, else of bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = _json(data, rng) if rng.random() < 0.8 else _bytes(data, rng)
    return data[: 1 << 20]


def _json(data: bytes, rng: random.Random) -> bytes:
    start = min((data.find(mark) for mark in (b"{", b"[") if mark in data[:9]), default=-1)
    try:
        value, end = json.JSONDecoder().raw_decode(data[start:].decode() if start >= 0 else "")
    except (ValueError, RecursionError):
        return _bytes(data, rng)
    rest = data[start:].decode()[end:].encode()
    holders = [
        (holder, key) for holder in _walk(value) for key in (holder if isinstance(holder, dict) else range(len(holder)))
    ]
    if holders:
        _change(*rng.choice(holders), rng, holders)
    text = json.dumps(value).encode()
    prefix = struct.pack("<Q", len(text)) if start == 8 and rng.random() < 0.9 else data[:start]
    return prefix + text + rest


def _change(holder: Any, key: Any, rng: random.Random, holders: list[Any]) -> None:
    """One value replaced, moved, removed, doubled, nested, or its key renamed."""
    action, (other, where) = rng.randrange(8), rng.choice(holders)
    with suppress(LookupError):
        if action < 4:
            old = holder[key]
            near = [old + 1, old - 1, old * 2, old * 2**40] if type(old) is int else []
            holder[key] = rng.choice((*NUMBERS, *TEXTS, *OTHERS, *near * 8))
        elif action == 4:
            del holder[key]
        elif action == 5:
            holder[key] = json.loads(json.dumps(other[where]))
        elif action == 6 and isinstance(holder, list):
            holder.insert(key, json.loads(json.dumps(holder[key])))
        elif action == 7 and isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = holder.pop(key)


def _walk(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _walk(inner)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data) + 1), rng.choice((0, 1, 1, 2, 4, 8))
    put = rng.choice((rng.randbytes(size), rng.choice(BYTES), data[at : at + size] * 2))
    if rng.random() < 0.1:
        return data[:at]
    if rng.random() < 0.2 and data:
        at = rng.randrange(min(len(data), 40))  # where headers and selectors are
    return data[:at] + put + data[at + size :]


def attempt(target: Callable[[World, bytes], None], world: World, data: bytes) -> str | None:
    """Give one input to a target; what is wrong in a line, None if nothing is."""
    said, begun = None, time.monotonic()
    world.limit(ROOM)
    try:
        signal.setitimer(signal.ITIMER_REAL, HANG)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("error")
            target(world, data)
    except (Exception, Hang) as error:  # noqa: BLE001  whatever it is, it is a finding
        said = _line(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        world.unlimit()
    if said is None and time.monotonic() - begun > HANG:
        said = "Hang: too slow"
    return said or world.strays()


def _line(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/relexio/" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}: {str(error)[:160]!r}"


def _hung(number: int, frame: object) -> None:
    raise Hang(f"more than {HANG:.0f} s")


class Session:
    """One target under fuzz in a process of its own: counts, and the input being tried, are seen by the parent."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.shared = mmap.mmap(-1, 1 << 21)
        self.seen: set[str] = set()

    def numbers(self) -> tuple[int, int, int]:
        """Inputs tried, findings, and bytes of the input being tried."""
        return struct.unpack("<QQQ", self.shared[:24])

    def found(self, data: bytes, said: str) -> None:
        """Write an input to the findings, once for each place in the code."""
        key = said.split(": ")[0]
        if key not in self.seen:
            self.seen.add(key)
            place = Path(self.options.findings, self.name)
            place.mkdir(parents=True, exist_ok=True)
            file = place / f"found-{sha256(data).hexdigest()[:12]}"
            file.write_bytes(data)
            print(f"FOUND {self.name}: {said} ({file})", flush=True)

    def run(self) -> bool:
        """Fuzz for the time given. False where anything was found."""
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            try:
                self._child()
            except BaseException:  # noqa: BLE001  a child must never come back as a second parent
                traceback.print_exc()
            os._exit(3)
        _, status = os.waitpid(child, 0)
        count, wrong, size = self.numbers()
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            self.found(self.shared[24 : 24 + size], f"process ended with {code}: at input {count}")
            wrong += 1
        how = "guided by coverage" if atheris and self.options.coverage else "plain"
        print(f"{self.name}: {count} inputs in {time.monotonic() - begun:.0f} s, {how}: {wrong} findings", flush=True)
        return wrong == 0

    def _child(self) -> None:
        signal.signal(signal.SIGALRM, _hung)
        with World() as world:
            seeds = [p.read_bytes() for p in sorted(Path(self.options.corpus, self.name).glob("*")) if p.is_file()]
            seeds += good_seeds(world, self.name)

            def one(data: bytes) -> None:
                count, wrong, _ = self.numbers()
                self.shared[:24] = struct.pack("<QQQ", count + 1, wrong, len(data))
                self.shared[24 : 24 + len(data)] = data
                if said := attempt(TARGETS[self.name], world, data):
                    self.found(data, said)
                    self.shared[:24] = struct.pack("<QQQ", count + 1, len(self.seen), len(data))

            if self.options.coverage and atheris:
                self._guided(one, seeds, world)
            rng, end, pool = (
                random.Random(f"{self.options.seed} {self.name}"),
                time.monotonic() + self.options.seconds,
                [*seeds],
            )
            for data in seeds:
                one(data)
            while time.monotonic() < end:
                data = mutate(rng.choice(pool), rng)
                pool = [*pool, data] if rng.random() < 0.02 and len(pool) < 500 else pool
                one(data)
        os._exit(0)

    def _guided(self, one: Callable[[bytes], None], seeds: list[bytes], world: World) -> None:
        for seed in seeds:
            (world.root / "seeds").mkdir(exist_ok=True)
            (world.root / "seeds" / sha256(seed).hexdigest()[:12]).write_bytes(seed)

        def custom(data: bytes, most: int, seed: int) -> bytes:
            rng = random.Random(seed)
            return (mutate(data, rng) if rng.random() < 0.7 else atheris.Mutate(data, most))[:most]

        limits = [
            f"-max_total_time={self.options.seconds}",
            "-max_len=100000",
            "-timeout=60",
            "-rss_limit_mb=0",
            "-verbosity=0",
        ]
        atheris.Setup(
            ["fuzz", *limits, f"-seed={self.options.seed}", str(world.root / "seeds")], one, custom_mutator=custom
        )
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--corpus", default=CORPUS, help="inputs to begin with, in a directory for each target")
    parser.add_argument("--findings", default=Path(tempfile.gettempdir(), "relexio-findings"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--coverage", action="store_true")
    options = parser.parse_args()
    if options.coverage and not atheris:
        print("atheris is not installed: going on without coverage", file=sys.stderr)
    names = TARGETS if "all" in options.targets else options.targets
    whole = [Session(name, options).run() for name in names]
    sys.exit(0 if all(whole) else 1)


if __name__ == "__main__":
    main()
