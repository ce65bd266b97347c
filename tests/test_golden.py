"""The bytes of the store and of a written checkpoint, fixed: other readers depend on them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import xxhash
import zarr

from relexio.checkpoints.header import header_for_transformers
from relexio.dtypes import Table
from relexio.store.schema import lay_out
from tests.support.make import BF16, CONFIG, Run, save_file
from tests.support.steps import fit_run, predict_run, small_blocks, store_run

#: XXH3 of the base's one block, and SHA-256 of that; the same SHA-256 of steps 1, 4 and 6.
BASE_DIGEST = "dd075d93e2321abb2be12f0fca440ed2"
BASE_CONTENT = "f8a54dbca41f7d012a76f5696a61304c29bb362e13c1d58be3a18de651fadbd8"
CONTENT = [
    "ebd38c2ee179afe92f0841b873c28a7f9033f9e914c6ab4686f0afeed607eccc",
    "f26bcbaddc0a93be001849a30a1c389804d6771e270bc17fb0b5a9c4c83ae961",
    "22cc51560a990d3189b232364866ddbffb2ede766f2508881225e10d111dfcc1",
]
BLOSC = {"cname": "zstd", "clevel": 1, "blocksize": 1048576}


def tiny(root: Path) -> Run:
    """One tensor of ten elements, of which step 1 changes the second and step 4 the second, third and last."""
    base = np.arange(1, 11, dtype=np.float32).astype(BF16)
    first, second = base.copy(), base.copy()
    first[1], second[1], second[2], second[9] = 2.5, 3.0, 3.5, -1.0
    return Run(root, {"w": base}, {1: {"w": first}, 4: {"w": second}})


@pytest.fixture
def golden(tmp_path: Path) -> tuple[Run, Path]:
    """A run and its store: ten elements as above and a hundred more, of which step 6 moves the last one."""
    one = tiny(tmp_path / "one")
    many, moved = np.ones(100, BF16), np.ones(100, BF16)
    moved[99] = 1.0078125
    steps = {1: {**one.steps[1], "v": many}, 4: {**one.steps[4], "v": many}, 6: {**one.steps[4], "v": moved}}
    run = Run(tmp_path, {**one.base, "v": many}, steps)
    store_run(run, tmp_path / "run.zarr")
    return run, tmp_path / "run.zarr"


def begins(file: Path, dtype: str, values: list[int], length: int) -> None:
    """A chunk's file holds these values and zeros, by Blosc alone; its last four bytes are a checksum."""
    chunk = np.frombuffer(numcodecs.Blosc().decode(file.read_bytes()[:-4]), dtype)
    assert chunk.tolist() == [*values, *[0] * (length - len(values))]


def file_hash(file: Path) -> int:
    return int(xxhash.xxh3_64_intdigest(file.read_bytes()))


def test_files_and_marker(golden: tuple[Run, Path]) -> None:
    run, store = golden
    header = (run.base_path / "model.safetensors").read_bytes()
    contents = [header[8 : 8 + int.from_bytes(header[:8], "little")], *map(str.encode, CONFIG.values())]
    files = [f"files/{hashlib.sha256(content).hexdigest()[:32]}" for content in contents]
    groups = ["base", "base/bf16", "files", "segments", "segments/0000", "segments/0000/bf16"]
    large = ["base/bf16/bits/c/0", "segments/0000/bf16/when/c/0", "segments/0000/bf16/by/c/0"]
    small = [
        *("base/bf16/hashes/c/0", "base/bf16/digest/c/0/0", "segments/0000/changed/c/0/0"),
        *(f"segments/0000/bf16/{name}" for name in ("index/c/0/0", "hashes/c/0", "digest/c/0/0/0")),
    ]
    chunks = [*large, *small, *(f"{file}/c/0" for file in files)]
    arrays = [chunk.split("/c/")[0] for chunk in chunks]
    found = {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()}
    assert found == {"zarr.json", *(f"{node}/zarr.json" for node in (*groups, *arrays)), *chunks}

    def hash_of(path: str) -> str:
        return str(xxhash.xxh3_128_hexdigest((store / (path if "/c/" in path else f"{path}/zarr.json")).read_bytes()))

    bound = {path: hash_of(path) for path in (*groups, *arrays, *small)}
    text = (store / "zarr.json").read_text()
    marker, copy = json.loads(text)["attributes"]["relexio"], json.loads(text)["consolidated_metadata"]
    nodes = {node: json.loads((store / node / "zarr.json").read_text()) for node in (*groups, *arrays)}
    assert copy == {"kind": "inline", "must_understand": False, "metadata": nodes}
    head, _, compact = text.removesuffix("\n}").partition(',\n  "consolidated_metadata": ')
    assert marker == {
        "consolidated": xxhash.xxh3_128_hexdigest(compact.encode()),
        "format": 3,
        "block": 65536,
        "base_content": BASE_CONTENT,
        "metadata": {path: hashed for path, hashed in bound.items() if not path.startswith("segments/")},
        "next": 1,
        "segments": [
            {
                "name": "0000",
                "steps": [1, 4, 6],
                "content": CONTENT,
                "metadata": {path: hashed for path, hashed in bound.items() if path.startswith("segments/")},
            }
        ],
        "seal": marker["seal"],
    }
    blank = f"{head}\n}}".replace(marker["seal"], "0" * 32)
    assert xxhash.xxh3_128_hexdigest(blank.encode()) == marker["seal"]


def test_base(golden: tuple[Run, Path]) -> None:
    _, store = golden
    root: Any = zarr.open_group(store, mode="r")
    assert root["base"].attrs["tensors"] == [
        {"name": "w", "dtype": "BF16", "shape": [10], "first": 0},
        {"name": "v", "dtype": "BF16", "shape": [100], "first": 10},
    ]
    bits = root["base/bf16/bits"]
    assert (bits.dtype, bits.shape, bits.chunks) == ("uint16", (65536,), (65536,))
    numbers = [0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120]  # 1 to 10
    begins(store / "base/bf16/bits/c/0", "<u2", [*numbers, *[0x3F80] * 100], 65536)
    assert root["base/bf16/hashes"][:].tolist() == [file_hash(store / "base/bf16/bits/c/0")]
    assert codecs(store / "base/bf16/bits") == [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "blosc", "configuration": {**BLOSC, "shuffle": "shuffle", "typesize": 2}},
        {"name": "crc32c"},
    ]


def test_moves(golden: tuple[Run, Path]) -> None:
    """K = 3 columns, so a block has room for 4 * 65536 entries, and a cell is element * 3 + column.

    element 1    column 0   cell 3     gap 3                 2.0 to 2.5     4000 to 4020: up by 20, in zigzag 40
    element 1    column 1   cell 4     gap 0                 2.5 to 3.0     4020 to 4040: up by 20, in zigzag 40
    element 2    column 1   cell 7     gap 2                 3.0 to 3.5     4040 to 4060: up by 20, in zigzag 40
    element 9    column 1   cell 28    gap 20                10.0 to -1.0   4120 to BF80; in the order of the numbers
                                       C120 to 407F: 407F - C120 = 7F5F modulo 2^16, which is not negative: FEBE
    element 109  column 2   cell 329   gap 300 = 255 + 45    1.0 to 1.0078125   3F80 to 3F81: up by 1, in zigzag 2
    """
    _, store = golden
    root: Any = zarr.open_group(store / "segments/0000", mode="r")
    entries = {
        "when": ("|u1", [3, 0, 2, 20, 255, 45], "gap_byte"),
        "by": ("<u2", [0x40, 0x40, 0x40, 0xFEBE, 2], "move"),
    }
    for name, (dtype, values, axis) in entries.items():
        array = root[f"bf16/{name}"]
        assert array.metadata.dimension_names == (axis,)
        assert (array.dtype, array.shape, array.chunks) == (dtype, (262144,), (262144,))
        begins(store / f"segments/0000/bf16/{name}/c/0", dtype, values, 262144)
    assert root["bf16/index"][:].tolist() == [[6, 5]]
    assert root["changed"][:].tolist() == [[1, 3, 3], [0, 0, 1]]
    hashes = [file_hash(store / f"segments/0000/bf16/{name}/c/0") for name in ("when", "by")]
    assert root["bf16/hashes"][:].tolist() == hashes
    assert codecs(store / "segments/0000/bf16/by") == codecs(store / "base/bf16/bits")
    assert codecs(store / "segments/0000/bf16/when") == [
        {"name": "bytes"},
        {"name": "blosc", "configuration": {**BLOSC, "shuffle": "noshuffle", "typesize": 1}},
        {"name": "crc32c"},
    ]


def codecs(array: Path) -> list[Any]:
    found: list[Any] = json.loads((array / "zarr.json").read_text())["codecs"]
    return found


def test_digests(golden: tuple[Run, Path]) -> None:
    run, store = golden
    root: Any = zarr.open_group(store, mode="r")
    states = [run.base, *run.steps.values()]
    digests = [xxhash.xxh3_128(state["w"].tobytes() + state["v"].tobytes()).digest() for state in states]
    assert digests[0].hex() == BASE_DIGEST
    assert root["base/bf16/digest"][:].tobytes() == digests[0]
    assert root["segments/0000/bf16/digest"][:].tobytes() == b"".join(digests[1:])
    assert [hashlib.sha256(digest).hexdigest() for digest in digests] == [BASE_CONTENT, *CONTENT]


def test_places_of_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 1024 elements and one column in chunks of 256: four chunks of ``when`` and of ``by`` a block, of which those
    are there that hold something."""
    small_blocks(monkeypatch, 1024, 256)
    base = np.ones(3000, np.float32)
    step = base.copy()
    step[:300] = 2.0  # block 0: 300 moves; block 1: none; block 2: one, with a gap of 255 + 245
    step[2548] = 2.0
    run, store = Run(tmp_path, {"w": base}, {1: {"w": step}}), tmp_path / "run.zarr"
    store_run(run, store)
    root: Any = zarr.open_group(store / "segments/0000/f32", mode="r")
    assert root["index"][:].tolist() == [[300, 300], [0, 0], [2, 1]]
    chunks = {"when": {0: 0, 1: 1, 8: 16}, "by": {0: 4, 1: 5, 8: 20}}  # which are there, and where their hashes are
    wanted = [0] * 24
    for name, places in chunks.items():
        assert {int(path.name) for path in (store / f"segments/0000/f32/{name}/c").iterdir()} == places.keys()
        for chunk, place in places.items():
            wanted[place] = file_hash(store / f"segments/0000/f32/{name}/c/{chunk}")
    assert root["hashes"][:].tolist() == wanted


def test_order_of_elements() -> None:
    """One run for each kind; the 65th tensor of a block that is not full begins the next one."""
    table: Table = {}
    for number in range(64):
        table[str(number)] = "BF16", (3,)
    table["bool"], table["empty"], table["int"] = ("BOOL", (5,)), ("BF16", (0,)), ("I32", (2,))
    table["next"], table["last"] = ("BF16", (1500,)), ("BF16", (2, 2))
    first = {tensor.name: tensor.first for tensor in lay_out(table, 1024)}
    wanted = {f"{i}": 3 * i for i in range(64)}
    assert first == wanted | {"bool": 0, "empty": 1024, "next": 1024, "last": 2524, "int": 5}


def test_written_checkpoint(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    out = predict_run(fit_run(store_run(run, tmp_path / "run.zarr")), 10, tmp_path / "out")
    written, base = ((p / "model.safetensors").read_bytes() for p in (out, run.base_path))
    assert written[:-20] == base[:-20], "header and order are the base's"
    found = np.frombuffer(written[-20:], np.uint16).view(BF16)
    assert found[[0, *range(3, 9)]].tolist() == run.base["w"][[0, *range(3, 9)]].tolist(), (
        "what never changed is the base's"
    )
    assert found[[1, 2, 9]].astype(float).tolist() == [5.0, 4.5, -22.875]  # the float64 oracle, rounded


def test_a_header_without_format_gets_one(tmp_path: Path) -> None:
    save_file(tmp_path / "x.safetensors", {"w": np.zeros(3, np.float32)}, metadata={"by": "me"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    header = header_for_transformers(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header == (
        b'{"__metadata__":{"by":"me","format":"pt"},"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    ) + b" " * (-len(header.rstrip()) % 8)
