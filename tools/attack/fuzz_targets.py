"""What tools/attack/fuzz.py gives its bytes to: each target lets only a RelexioError pass, and stays in its directory."""

import io
import json
import os
import resource
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import google_crc32c
import numpy as np

from relexio import atomic
from relexio.checkpoints.header import parse_header, read_shard
from relexio.checkpoints.layout import open_checkpoint
from relexio.cli.main import main
from relexio.dtypes import tensor_bytes
from relexio.engine.resources import Resources
from relexio.errors import RelexioError
from relexio.fit.fit import fit
from relexio.methods import Recipe
from relexio.progress import silent
from relexio.store import chunks
from relexio.store.arrays import MOVES
from relexio.store.opening import open_store
from relexio.store.seal import hash_of
from relexio.verbs import convert as verb
from relexio.verbs.inspect import inspect
from relexio.verbs.output import Target
from relexio.verbs.predict import predict
from relexio.verbs.restore import restore
from relexio.verbs.verify import find_originals, verify
from relexio.words import parse_size, parse_steps

BLANK = "0" * 32
STEPS = (1, 2, 3, 5)
SHAPES = {
    "model.embed_tokens.weight": ("BF16", (40, 30)),
    "w": ("F32", (7, 9)),
    "half": ("F16", (11,)),
    "n": ("I64", (3,)),
}
SIZES = {"BF16": 2, "F32": 4, "F16": 2, "I64": 8}


def file_of(header: Any, body: bytes) -> bytes:
    """A safetensors file."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def shard_of(step: int, names: list[str]) -> bytes:
    """A good safetensors file of some tensors at a step."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body, rng = b"", np.random.default_rng(7)
    for name in names:
        dtype, shape = SHAPES[name]
        size = int(np.prod(shape)) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(body), len(body) + size]}
        values = rng.integers(0, 40, size, np.uint8)  # small bytes: nothing is NaN
        if dtype != "I64":
            values[:: 2 * SIZES[dtype]] += np.uint8(step)
        body += values.tobytes()
    return file_of(header, body)


@contextmanager
def allowed() -> Iterator[None]:
    """What hostile input may come to."""
    with suppress(RelexioError):
        yield


class World:
    """A good store and checkpoints in a temporary directory, put right again after each input."""

    def __enter__(self) -> "World":
        for name in ("sync", "sync_tree"):
            setattr(atomic, name, lambda path: None)  # power does not fail here, and this took most of the time
        memory = Path("/dev/shm")
        self.root = Path(tempfile.mkdtemp(prefix="relexio-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
        for step in (0, *STEPS):
            where = self.root / "run" / (f"global_step_{step}" if step else "base")
            where.mkdir(parents=True)
            (where / "config.json").write_text("{}\n")
            (where / "model.safetensors").write_bytes(shard_of(step, list(SHAPES)))
        self.area, self.store = self.root / "area", self.root / "run.zarr"
        self.area.mkdir()
        self.resources = Resources(workers=1, device="cpu")
        for steps in ("1:3", "5"):
            base = None if self.store.exists() else self.root / "run/base"
            request = verb.Request(self.store, base, self.root / "run", {}, parse_steps(steps))
            verb.convert(verb.prepare(request, self.resources, silent), silent)
        fit(open_store(self.store), STEPS, Recipe(), "gram", self.resources, silent)
        self.good = {p: p.read_bytes() for p in sorted(self.store.rglob("*")) if p.is_file()}
        self.files = [str(p.relative_to(self.store)) for p in self.good]
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.root)

    def limit(self, room: int) -> None:
        """Let this process take so much more memory."""
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + room, resource.RLIM_INFINITY))

    def unlimit(self) -> None:
        """Take the limit away."""
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def strays(self) -> str | None:
        """Files where none belong, removed."""
        known = {"run", "run.zarr", "area", "seeds"}
        found = [p for p in (*self.root.iterdir(), *self.area.iterdir()) if p.name not in known]
        for path in found:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return f"Stray: {found}" if found else None

    def put(self, changed: dict[str, bytes]) -> None:
        """The good store with other contents of some files."""
        for name, data in changed.items():
            (self.store / name).write_bytes(data)

    def mend(self) -> None:
        """Make the store good again."""
        for path in self.store.rglob("*"):
            if path.is_file() and path not in self.good:
                path.unlink()
        for path, data in self.good.items():
            if not path.is_file() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def use(self, changed: dict[str, bytes], kept: bool = False) -> None:
        """Do all that a store is for with one that has other contents in some files."""
        self.put(changed)
        if not kept:
            shutil.rmtree(self.store / "cache", ignore_errors=True)
        try:
            with allowed():
                store, out = open_store(self.store), self.area / "out"
                with allowed():
                    verify(store, find_originals(store, None, None), self.resources, silent)
                with allowed():
                    restore(store, store.steps[-1], out, self.resources, silent)
                shutil.rmtree(out, ignore_errors=True)
                with allowed():
                    fitted = fit(store, store.steps, Recipe(), "gram", self.resources, silent)
                    predict(fitted, [Target(store.steps[-1] + 4, out)], self.resources, silent)
                with allowed():
                    fit(store, store.steps, Recipe(), "blocks", self.resources, silent)
                with allowed():
                    inspect(store, store.steps, 1, self.resources, silent).to_json()
        finally:
            shutil.rmtree(self.area / "out", ignore_errors=True)
            self.mend()


def sealed(text: bytes, changed: dict[str, bytes] | None = None) -> bytes:
    """A root's zarr.json with its hashes made right: its own, and those of files that have other contents."""
    hashes = {name.removesuffix("/zarr.json"): hash_of(data) for name, data in (changed or {}).items()}
    try:
        value = json.loads(text)
        record = value["attributes"]["relexio"]
        for table in (record["metadata"], *(segment["metadata"] for segment in record.get("segments", []) if changed)):
            table.update({name: hashes[name] for name in hashes if name in table})
        record["seal"] = BLANK
        text = json.dumps(value).encode()
        return text.replace(BLANK.encode(), hash_of(text).encode())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return text


def pick(names: list[str], data: bytes) -> tuple[str, bytes]:
    """One of the names by the first byte, and the rest."""
    return names[data[0] % len(names) if data else 0], data[1:]


def header(world: World, data: bytes) -> None:
    path = world.root / "run" / "fuzzed.safetensors"
    path.write_bytes(data)
    with allowed():
        assert read_shard(path).entries is not None
    with allowed():
        parse_header(data[8:], len(data) + 4096, "fuzzed")
    path.unlink()


def index(world: World, data: bytes) -> None:
    where = world.root / "run" / "sharded"
    where.mkdir(exist_ok=True)
    for number, names in enumerate((["w", "half"], ["n"])):
        (where / f"{number}.safetensors").write_bytes(shard_of(0, names))
    (where / "model.safetensors.index.json").write_bytes(data)
    with allowed():
        open_checkpoint(where, 3)
    shutil.rmtree(where)


def side(world: World, data: bytes) -> None:
    """A directory of files, links, fifos, directories and sparse files, as JSON says: {name: [what, text]}."""
    where = world.area / "run"
    (where / "sub").mkdir(parents=True)
    (where / "model.safetensors").write_bytes(shard_of(0, ["w"]))
    try:
        table = json.loads(data)
        for name, (what, text) in table.items():
            with suppress(OSError, ValueError, TypeError):
                _special(where / "/".join(part for part in name.split("/") if part not in ("", "..")), what, text)
    except (ValueError, TypeError, AttributeError, RecursionError):
        (where / "broken.json").write_bytes(data)
    try:
        with allowed():
            found = open_checkpoint(where)
            taken = [*found.side.values(), *(file.path for file in found.files)]
            assert all(isinstance(path, Path) and path.resolve().is_relative_to(where.resolve()) for path in taken)
            record = found.record(_Names().name)
            assert json.dumps(record.to_json())
    finally:
        shutil.rmtree(where)


def torch(world: World, data: bytes) -> None:
    """A torch file, or a pickle that is put into one; the first byte says which, and as which file."""
    names = ["pytorch_model.bin", "model_world_size_1_rank_0.pt"]
    kinds = [f"{kind} {name}" for kind in ("file", "pickle") for name in names]
    name, data = pick([*kinds, "file pytorch_model_fsdp_0/.metadata"], data)
    kind, name = name.split()
    where = world.area / "torch"
    (where / name).parent.mkdir(parents=True)
    (where / "pytorch_model_fsdp_0").mkdir(exist_ok=True)
    (where / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(torch_file_of(TORCH[:2] + TORCH[13:-2] + b"."))
    (where / name).write_bytes(data if kind == "file" else torch_file_of(data))
    try:
        with allowed():
            found = open_checkpoint(where)
            for tensor, (dtype, shape) in found.tensors.items():
                count = tensor_bytes(dtype, shape)
                assert count <= len(data) + 1000
                found.read(tensor, 0, memoryview(bytearray(count)))
    finally:
        shutil.rmtree(where)


def torch_file_of(pickle: bytes) -> bytes:
    """A good torch file, with this pickle and a storage of six float32."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, member in (("data.pkl", pickle), ("byteorder", b"little"), ("data/0", bytes(24))):
            file.writestr(zipfile.ZipInfo(f"a/{name}"), member)
    return out.getvalue()


#: The pickle of {"w": a tensor [2, 3]}, as torch writes it.
TORCH = (
    b"\x80\x02}q\x00X\x01\x00\x00\x00wq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storageq\x03"
    b"ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x06tq\x07QK\x00K\x02K\x03\x86q\x08K\x03K\x01\x86"
    b"q\t\x89ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rs."
)


class _Names:
    def name(self, data: bytes | Path) -> str:
        return str(len(data if isinstance(data, bytes) else data.read_bytes()))


def _special(path: Path, what: str, text: str) -> None:
    if what in ("link", "fifo", "dir", "sparse"):
        path.unlink(missing_ok=True)
    if what == "link":
        path.symlink_to(text)
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "dir":
        path.mkdir()
    else:
        path.write_text(text)
        if what == "sparse":
            os.truncate(path, 1 << 33)


def steps(world: World, data: bytes) -> None:
    with suppress(RelexioError, click.UsageError):
        chosen = parse_steps(data.decode("utf-8", "surrogateescape"))
        assert [step in chosen for step in (0, 1, 75, 10**14, 10**15, -1)] and len(chosen.named) <= len(data)


def size(world: World, data: bytes) -> None:
    with suppress(RelexioError, click.UsageError):
        assert parse_size(data.decode("utf-8", "surrogateescape")) >= 0


def marker(world: World, data: bytes) -> None:
    world.use({"zarr.json": sealed(data)})


def metadata(world: World, data: bytes) -> None:
    nodes = [f for f in world.files if f.endswith("/zarr.json") and not f.startswith("cache/")]
    name, data = pick(nodes, data)
    root = world.good[world.store / "zarr.json"]
    world.use({name: data, "zarr.json": sealed(root, {name: data})})


def bound(world: World, changed: dict[str, bytes]) -> dict[str, bytes]:
    """Chunks with the hashes that bind them to their places made right, so that what is in them is read."""
    made = dict(changed)
    for name, data in changed.items():
        array, _, number = name.partition("/c/")
        top, _, what = array.rpartition("/")
        if what in ("bits", *MOVES):
            names = MOVES if what in MOVES else ("bits",)
            hashes = f"{top}/hashes/c/0"
            (count,) = json.loads(world.good[world.store / top / "hashes" / "zarr.json"])["shape"]
            with suppress(ValueError):  # they are fuzzed themselves
                table = chunks.decode(made.get(hashes, world.good[world.store / hashes]), np.dtype("<u8"), count)
                table[names.index(what) * (count // len(names)) + int(number)] = chunks.short_hash(data)
                made[hashes] = chunks.encode(table)
    return {**made, "zarr.json": sealed(world.good[world.store / "zarr.json"], made)}


def _with_crc(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")


def chunk(world: World, data: bytes) -> None:
    """The bytes of one chunk, without its checksum."""
    name, data = pick([f for f in world.files if "/c/" in f and not f.startswith("cache/")], data)
    for dtype, count in (("u1", 64), ("<u2", 1024), ("<u4", 4096)):
        with suppress(ValueError, RuntimeError):  # what the store makes a StoreError
            chunks.decode(_with_crc(data), np.dtype(dtype), count)
    world.use(bound(world, {name: _with_crc(data)}))


def moves(world: World, data: bytes) -> None:
    """The elements of some chunks of when, by, bits or what is small, repeated until they fill it."""
    names = [f for f in world.files if "/c/" in f and f.startswith(("base/", "segments/"))]
    changed = {}
    for piece in data.split(b"\xfe\xfe")[:3]:
        name, piece = pick(names, piece)
        meta = json.loads(world.good[world.store / name.split("/c/")[0] / "zarr.json"])
        dtype, shape = np.dtype(meta["data_type"]), meta["chunk_grid"]["configuration"]["chunk_shape"]
        filled = np.resize(np.frombuffer(piece or b"\0", np.uint8), int(np.prod(shape)) * dtype.itemsize)
        changed[name] = chunks.encode(filled.view(dtype))
    world.use(bound(world, changed))


def kept(world: World, data: bytes) -> None:
    """A file of a kept fit: metadata with its hashes made right, or the elements of the chunk."""
    name, data = pick([f for f in world.files if f.startswith("cache/gram")], data)
    root = next(f for f in world.files if f.startswith("cache/") and f.count("/") == 2 and f.endswith("zarr.json"))
    if "/c/" in name:
        count = len(SHAPES) * len(STEPS) ** 2
        filled = np.resize(np.frombuffer(data or b"\0", np.uint8), (count - len(STEPS) ** 2) * 8).view("<f8")
        return world.use({name: chunks.encode(filled)}, kept=True)
    if name == root:
        return world.use({name: sealed(data)}, kept=True)
    node = name.removesuffix("/zarr.json").rsplit("/", 1)[1]
    return world.use({name: data, root: sealed(world.good[world.store / root], {node: data})}, kept=True)


def cli(world: World, data: bytes) -> None:
    """Arguments, one a line, of a command that is chosen by the first byte."""
    run, store, out = world.root / "run", world.store, str(world.area / "out")
    relex = ["predict", store, "--method", "relex", "--dry-run"]
    begins = (
        [*relex, "-o", out, "--step"], [*relex, "--step", 9, "-o", out],
        ["convert", run, "--base", run / "base", "-o", out, "--dry-run", "--steps"], ["restore", store, "-o", out, "--step"],
        ["convert", run, "--base", run / "base", "-o", out, "--dry-run", "--checkpoint"], ["inspect", store, "--window"],
        ["inspect", store, "--memory"], ["inspect"], [*relex, "--step", 9, "-o"],
    )  # fmt: skip
    begin, rest = pick([json.dumps(list(map(str, begin))) for begin in begins], data)
    more = [line.decode("utf-8", "surrogateescape").replace("\0", "") for line in rest.split(b"\n")]
    before = Path.cwd()
    os.chdir(world.area)
    try:
        if not any("://" in text or "scheduler" in text for text in more):  # nothing is to go over the network
            main([*json.loads(begin), *more])
    except SystemExit as end:
        assert end.code in (0, 1, 2), end.code
    finally:
        os.chdir(before)
        shutil.rmtree(out, ignore_errors=True)


Target_ = Callable[[World, bytes], None]
TARGETS: dict[str, Target_] = {
    "header": header, "index": index, "side": side, "torch": torch, "steps": steps, "size": size, "marker": marker,
    "metadata": metadata, "chunk": chunk, "moves": moves, "kept": kept, "cli": cli,
}  # fmt: skip


def good_seeds(world: World, name: str) -> list[bytes]:
    """Good inputs of a target, to begin with."""
    entry = {"0": ["file", "x"], "sub/a.json": ["file", "{}"], "b.json": ["link", "../../run.zarr/zarr.json"]}
    special = {
        "config.json": ["fifo", ""],
        "c.txt": ["link", "/dev/zero"],
        "sub/d.md": ["dir", ""],
        "e.json": ["sparse", "{"],
    }
    weights = {"w": "0.safetensors", "half": "0.safetensors", "n": "1.safetensors"}
    read = {str(p.relative_to(world.store)): data for p, data in world.good.items()}

    def chosen(names: list[str], cut: int = 0) -> list[bytes]:
        return [bytes([i]) + read[f][: len(read[f]) - cut] for i, f in enumerate(names)]

    stored = [f for f in world.files if not f.startswith("cache/")]
    return {
        "header": [
            shard_of(0, list(SHAPES)),
            file_of({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"abcd"),
        ],
        "index": [json.dumps({"metadata": {}, "weight_map": weights}).encode()],
        "torch": [*(bytes([i]) + torch_file_of(TORCH) for i in (0, 1)), *(bytes([i]) + TORCH for i in (2, 3))],
        "side": [json.dumps(table).encode() for table in (entry, special)],
        "steps": [b"1:75", b"10:300:10", b"1,2,5", b"80:", b"0:999999999999999:1"],
        "size": [b"2GB", b"512MiB", b"1.5G", b"1000000"],
        "marker": [read["zarr.json"]],
        "metadata": chosen([f for f in stored if f.endswith("/zarr.json")]),
        "chunk": chosen([f for f in stored if "/c/" in f], 4),
        "moves": [bytes([i, *some]) for i in range(0, 60, 3) for some in ((0, 1), (1,), (255,), (0, 0, 0, 2))],
        "kept": [*chosen([f for f in world.files if f.startswith("cache/gram")]), b"\0\0\0\0\0\0\0\xf0\x7f"],
        "cli": [bytes([i]) + text for i in range(9) for text in (b"9", b"1:3", b"7=run", b"2GB", b"9\n--rank\n2")],
    }[name]
