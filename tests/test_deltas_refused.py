"""Delta chains that are damaged, hostile, or not over their base: one line that says which, and nothing is left behind."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numcodecs import zstd

from relexio.checkpoints.layout import find_steps, open_checkpoint
from relexio.checkpoints.patch import Changes, unpacked_bytes
from relexio.errors import CheckpointError
from tests.support.command import Relexio
from tests.support.deltas import CHAINS, LEFT, model, unpack
from tests.support.make import load_file, save_checkpoint, save_file

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "base", model(0))
    return unpack(tmp_path)


def file_of(path: Path, name: str = EMBEDDING) -> tuple[Path, dict[str, str]]:
    """The file of a version that holds a tensor, and its metadata."""
    for file in sorted(path.glob("*.safetensors")):
        (length,) = struct.unpack("<Q", file.read_bytes()[:8])
        header = json.loads(file.read_bytes()[8 : 8 + length])
        if name in header:
            return file, header.get("__metadata__", {})
    raise AssertionError(name)


def replace_frame(path: Path, frame: bytes, name: str = EMBEDDING) -> None:
    """Put another frame in the place of a tensor's, in a version of slime."""
    file, checksums = file_of(path, name)
    tensors = load_file(file)
    save_file(file, {**tensors, name: np.frombuffer(frame, np.uint8)}, checksums)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the JSON of an index or a manifest."""
    file = next(path.glob("*.json"))
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def flip(path: Path) -> None:
    """Flip a bit of the last frame of a version's first file, where only the checksum tells."""
    file = sorted(path.glob("*.safetensors"))[0]
    tensors, (_, checksums) = load_file(file), file_of(path)
    name = EMBEDDING
    data = bytearray(zstd.decompress(tensors[name].tobytes()))
    data[-1] ^= 4
    save_file(file, {**tensors, name: np.frombuffer(zstd.compress(bytes(data), 1), np.uint8)}, checksums)


def cut(path: Path) -> None:
    file = sorted(path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-9])


def metadata(path: Path, **values: object) -> None:
    edit(path, lambda index: index["metadata"].update(values))


Spoiled = dict[str, tuple[Callable[[Path], object], str]]
SLIME: Spoiled = {
    "gap": (shutil.rmtree, r"step 4 \(.*weight_v000004\): changes version 3, and .*weight_v000003 is missing; copy it again"),
    "flipped": (flip, rf"step 3 \(.*\): tensor {EMBEDDING}: its xxh3-128 is \w+, and the trainer wrote \w+: the delta is damaged"),
    "truncated": (cut, r"weight_v000003/model-00000-of-00002.safetensors: truncated"),
    "shard": (lambda p: sorted(p.glob("*.safetensors"))[1].unlink(), "the index names this shard, but it is missing"),
    "index": (
        lambda p: next(p.glob("*.json")).unlink(),
        "has no model.safetensors.index.json, which the trainer writes last",
    ),
    "damaged": (
        lambda p: replace_frame(p, b"\x28\xb5\x2f\xfd\x60\x00\x0e" + b"\xff" * 20),
        f"tensor {EMBEDDING}: its delta is a damaged zstd frame",
    ),
    "no-frame": (lambda p: replace_frame(p, bytes(40)), f"tensor {EMBEDDING}: its delta is no zstd frame"),
    "bomb": (
        lambda p: replace_frame(p, zstd.compress(bytes(1 << 24), 1)),
        "unpacks to 16,777,216 bytes, and 3,840 bytes of tensor take 3,840",
    ),
    "encoding": (
        lambda p: metadata(p, delta_encoding="sparse"),
        "its deltas are 'sparse' in 'zstd'; xor and overwrite in zstd are read",
    ),
    "packing": (lambda p: metadata(p, compression_format="lz4"), "its deltas are 'xor' in 'lz4'"),
    "checksums": (
        lambda p: metadata(p, checksum_format="crc32"),
        "its checksums are 'crc32'; those that are read are xxh3-128, adler32",
    ),
    "version": (
        lambda p: metadata(p, version="000009", base_version="000008"),
        "says version 9, and its directory is weight_v000003",
    ),
    "base-version": (
        lambda p: metadata(p, base_version="000001"),
        "version 3 builds on version 1; one that builds on the last is read",
    ),
    "no-version": (lambda p: metadata(p, version=3), "says no version and base_version"),
    "outside": (
        lambda p: edit(p, lambda i: i.update(weight_map={EMBEDDING: "../x.safetensors"})),
        "names a shard outside its directory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SLIME)
def test_slime(runs: Path, tmp_path: Path, relexio: Relexio, case: str) -> None:
    """Version 3 of a chain, which has others behind it."""
    root = runs / "slime-xor"
    shutil.rmtree(root / "weight_v000003")  # in it nothing changed
    shutil.copytree(root / "weight_v000004", root / "weight_v000003")
    metadata(root / "weight_v000003", version="000003", base_version="000002")
    spoil, why = SLIME[case]
    spoil(root / "weight_v000003")
    refused(runs, relexio, root, why)


SKYRL: Spoiled = {
    "gap": (shutil.rmtree, r"step 3 \(.*\): changes version 2, and .*delta-00000002 is missing"),
    "truncated": (cut, r"delta-00000002/delta-rank00000-file000000.safetensors: truncated"),
    "flipped": (flip, r"step 2 \(.*\): tensor .*: its xxh3-128 is \w+, and the trainer wrote"),
    "dtype": (
        lambda p: edit(p, lambda m: m["tensors"][0].update(dtype="float16")),
        r"is F16 \[48, 40\], in base .* BF16 \[48, 40\]",
    ),
    "shape": (
        lambda p: edit(p, lambda m: m["tensors"][0].update(shape=[40, 48])),
        r"is BF16 \[40, 48\], in base .* BF16 \[48, 40\]",
    ),
    "name": (
        lambda p: edit(p, lambda m: m["tensors"][0].update(name="other")),
        "changes other, which base .* lacks; give the --base",
    ),
    "bytes": (
        lambda p: edit(p, lambda m: m["tensors"][0].update(compressed_num_bytes=5)),
        "does not hold what the manifest says",
    ),
    "checksum": (
        lambda p: edit(p, lambda m: m["tensors"][0].update(checksum="0" * 32)),
        "its xxh3-128 is .*, and the trainer wrote 0000",
    ),
    "twice": (lambda p: edit(p, lambda m: m["tensors"].append(m["tensors"][0])), "is there twice"),
    "file": (
        lambda p: edit(p, lambda m: m["payload_files"].append("../../base/model.safetensors")),
        "names a file that SkyRL does not write",
    ),
    "version": (
        lambda p: edit(p, lambda m: m.update(version=4, base_version=3)),
        "says version 4, and its directory is delta-00000002",
    ),
    "lists": (lambda p: edit(p, lambda m: m.pop("payload_files")), "has no lists tensors and payload_files"),
}  # fmt: skip


@pytest.mark.parametrize("case", SKYRL)
def test_skyrl(runs: Path, relexio: Relexio, case: str) -> None:
    spoil, why = SKYRL[case]
    if case == "flipped":
        edit(runs / "skyrl" / "delta-00000002", lambda m: None)
    spoil(runs / "skyrl" / "delta-00000002")
    if case == "flipped":
        file, _ = file_of(runs / "skyrl" / "delta-00000002")
        packed = load_file(file)[EMBEDDING].nbytes
        edit(runs / "skyrl" / "delta-00000002", lambda m: m["tensors"][0].update(compressed_num_bytes=packed))
    refused(runs, relexio, runs / "skyrl", why)


def refused(runs: Path, relexio: Relexio, root: Path, why: str, base: str = "base") -> None:
    done = relexio("convert", root, "--base", runs / base, "-o", runs / "run.zarr")
    assert done.code == 1 and done.err.count("\n") <= 1, done.err
    assert re.search(why, done.err), done.err
    assert not list(runs.glob("run.zarr*"))


@pytest.mark.parametrize("case", ["slime-xor", "slime-overwrite", "skyrl"])
def test_a_wrong_base(runs: Path, relexio: Relexio, case: str) -> None:
    save_checkpoint(runs / "other", {**model(0), LEFT: model(2)[LEFT]})
    refused(
        runs, relexio, runs / case, rf"step 1 \(.*\): tensor {LEFT}: its .* is not what the chain goes on from", "other"
    )
    (runs / "narrow").mkdir()
    small = {name: array[: len(array) // 2] for name, array in model(0).items()}
    save_checkpoint(runs / "narrow", small)
    refused(runs, relexio, runs / case, r"tensor .*: (its delta (unpacks|has)|is BF16|its)", "narrow")


def test_what_comes_before_is_needed_too(runs: Path, relexio: Relexio) -> None:
    """Steps that were not chosen are read where those that were build on them."""
    cut(runs / "slime-xor" / "weight_v000002")
    done = relexio("convert", runs / "slime-xor", "--base", runs / "base", "-o", runs / "run.zarr", "--steps", "4")
    assert done.code == 1 and "weight_v000002/model-00000-of-00002.safetensors: truncated" in done.err
    done = relexio("convert", runs / "slime-xor", "--base", runs / "base", "-o", runs / "run.zarr", "--steps", "1")
    assert done.code == 0, done.err


def test_the_last_version_may_be_incomplete(runs: Path, relexio: Relexio) -> None:
    next((runs / "slime-xor" / "weight_v000005").glob("*.json")).unlink()
    done = relexio("convert", runs / "slime-xor", "--base", runs / "base", "-o", runs / "run.zarr")
    assert done.code == 0 and "step 5 is not complete yet, and left out" in done.out + done.err


def test_a_delta_is_no_base(runs: Path, relexio: Relexio) -> None:
    refused(runs, relexio, runs / "slime-xor", "holds a delta, not a model", "slime-xor/weight_v000001")


def test_too_little_memory_is_refused(runs: Path, monkeypatch: pytest.MonkeyPatch, relexio: Relexio) -> None:
    """A tensor and its patch are in memory while it is unpacked."""
    monkeypatch.setattr("relexio.checkpoints.chain._KEPT", 1 << 40)
    done = relexio("convert", runs / "slime-xor", "--base", runs / "base", "-o", runs / "run.zarr", "--memory", "2G")
    assert done.code == 1 and "--memory" in done.err and not list(runs.glob("run.zarr*"))


def frame(positions: list[int], values: bytes, count: int | None = None) -> bytes:
    head = struct.pack("<I", len(positions) if count is None else count)
    return zstd.compress(head + np.array(positions, "<u4").tobytes() + values, 1)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (frame([1, 9], b"ab"), "beyond the tensor's 8 bytes"),
        (frame([3, 1], b"ab"), "do not ascend"),
        (frame([3, 3], b"ab"), "do not ascend"),
        (frame([1], b"a", count=2**32 - 1), "where 4,294,967,295 changes take"),
        (frame([1], b"ab"), "where 1 changes take 9"),
        (frame(list(range(9)), b"a" * 9), "unpacks to 49 bytes, and 8 bytes of tensor take 44"),
        (zstd.compress(b"abc", 1), "unpacks to 3 bytes"),
        (b"\x28\xb5\x2f\xfd\x00\x58\x61\x00\x00abcdefghijkl", "does not say its size"),
    ],
)
def test_overwrite(data: bytes, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        Changes(data, "overwrite", 8)


def test_what_an_overwrite_changes() -> None:
    old = np.arange(8, dtype=np.uint8)
    changes = Changes(frame([0, 3, 7], b"xyz"), "overwrite", 8)
    assert bytes(old ^ changes.differences(0, old)) == b"x\1\2y\4\5\6z"
    assert bytes(old[3:7] ^ changes.differences(3, old[3:7])) == b"y\4\5\6"
    assert not Changes(frame([], b""), "overwrite", 8).differences(0, old).any()


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65535, 65791, 65792, 70000, 1 << 20])
def test_the_size_that_a_frame_says(size: int) -> None:
    assert unpacked_bytes(zstd.compress(bytes(size), 1)[:18], "xor", size) == size


def test_any_cut_or_flip_of_a_frame_is_told(runs: Path) -> None:
    """Byte by byte: no read ends in anything but the right bits or a CheckpointError."""
    path = runs / "slime-xor" / "weight_v000001"
    file, checksums = file_of(path, LEFT)
    tensors = load_file(file)
    packed = tensors[LEFT].tobytes()
    wanted = model(1)[LEFT].tobytes()
    for at in range(len(packed)):
        for bad in (packed[:at], packed[:at] + bytes([packed[at] ^ 0x41]) + packed[at + 1 :]):
            save_file(file, {**tensors, LEFT: np.frombuffer(bad, np.uint8)}, checksums)
            out = bytearray(len(wanted))
            try:
                open_checkpoint(path, 1).over(open_checkpoint(runs / "base")).read(LEFT, 0, memoryview(out))
            except CheckpointError:
                continue
            assert out == wanted


def test_the_directories_are_found_by_their_names(runs: Path) -> None:
    for case, names in CHAINS.items():
        assert [path.name for path in find_steps(runs / case)[0].values()] == [names.format(n) for n in range(1, 6)]
