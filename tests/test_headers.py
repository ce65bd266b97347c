"""Safetensors headers: what is well formed is read as the safetensors library reads it, all else is refused by name."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from relexio.bounded import loads
from relexio.checkpoints.header import MAX_HEADER, Entry, header_for_transformers, parse_header, read_shard
from relexio.errors import CheckpointError
from tests.support.make import save_file

FILE = "model-00007.safetensors"


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def parse(header: object, body: int = 8) -> tuple[Entry, ...]:
    """Parse a header given as JSON value, text or bytes, in front of ``body`` bytes of data."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text.encode() if isinstance(text, str) else text
    return parse_header(raw, 8 + len(raw) + body, FILE)


def file_of(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def library(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor, as the safetensors library has them."""
    return {name: (v["dtype"], tuple(v["shape"]), bytes(v["data"])) for name, v in safetensors.deserialize(raw)}


GOOD = json.dumps({"w": entry()}).encode()


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_names_dtypes_shapes_and_places(tmp_path: Path, shards: int) -> None:
    tensors = {f"t{i}": np.arange(6 * i, dtype=np.float32).reshape(i, 6) for i in range(1, shards + 1)}
    save_file(tmp_path / FILE, tensors)
    raw = (tmp_path / FILE).read_bytes()
    shard = read_shard(tmp_path / FILE)
    assert shard.size == len(raw)
    assert [(e.name, e.dtype, e.shape) for e in shard.entries] == [(n, "F32", a.shape) for n, a in tensors.items()]
    assert {e.name: raw[e.start : e.end] for e in shard.entries} == {n: a.tobytes() for n, a in tensors.items()}


@pytest.mark.parametrize("dtype", ["bool", "u1", "i8", "f2", "f4", "f8", "c8", "bfloat16", "float8_e5m2"])
def test_reads_what_the_safetensors_library_writes(dtype: str) -> None:
    raw = save({"x": np.ones(3, getattr(ml_dtypes, dtype, dtype)), "empty": np.zeros((0, 2), "f4")})
    (length,) = struct.unpack("<Q", raw[:8])
    found = parse_header(raw[8 : 8 + length], len(raw), FILE)
    assert {e.name: (e.dtype, e.shape, raw[e.start : e.end]) for e in found} == library(raw)


def test_tensors_come_in_the_order_of_their_bytes_not_of_the_header() -> None:
    header = {
        "late": entry(offsets=(8, 16)),
        "early": entry(offsets=(0, 8)),
        "none": entry(shape=[0], offsets=(16, 16)),
    }
    assert [e.name for e in parse(header, 16)] == ["early", "late", "none"]


@pytest.mark.parametrize(
    ("shape", "nbytes"), [([], 4), ([0], 0), ([0, 7], 0), ([3, 0, 2], 0), ([1] * 8, 4), ([2, 1, 3], 24)]
)
def test_empty_and_scalar_tensors_are_read(shape: list[int], nbytes: int) -> None:
    (found,) = parse({"w": entry(shape=shape, offsets=[0, nbytes])}, nbytes)
    assert (found.shape, found.nbytes) == (tuple(shape), nbytes)


@pytest.mark.parametrize(
    ("dtype", "count", "nbytes"), [("F4", 2, 1), ("F4", 6, 3), ("F6_E2M3", 4, 3), ("F6_E3M2", 8, 6)]
)
def test_types_below_a_byte_are_packed(dtype: str, count: int, nbytes: int) -> None:
    (found,) = parse({"w": entry(dtype, [count], [0, nbytes])}, nbytes)
    assert found.nbytes == nbytes


@pytest.mark.parametrize(
    ("dtype", "count", "nbytes"), [("F4", 3, 2), ("F4", 3, 1), ("F6_E2M3", 3, 3), ("F6_E3M2", 1, 1)]
)
def test_types_below_a_byte_must_fill_whole_bytes(dtype: str, count: int, nbytes: int) -> None:
    with pytest.raises(CheckpointError, match=f"{FILE}: tensor w: {dtype}"):
        parse({"w": entry(dtype, [count], [0, nbytes])}, nbytes)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 8 + len(GOOD) - 1, 8 + len(GOOD), 8 + len(GOOD) + 7])
def test_truncated_files_are_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / FILE
    path.write_bytes(file_of(GOOD, bytes(8))[:size])
    with pytest.raises(CheckpointError, match=r"model-00007.safetensors: truncated"):
        read_shard(path)


@pytest.mark.parametrize("length", [0, 1, 2, len(GOOD) - 1, len(GOOD) + 1, len(GOOD) + 8, len(GOOD) + 9])
def test_a_wrong_header_length_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / FILE
    path.write_bytes(file_of(GOOD, bytes(8), length))
    with pytest.raises(CheckpointError, match=FILE):
        read_shard(path)


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**31, 2**32, 2**63, 2**64 - 1])
def test_a_huge_header_length_is_refused_before_anything_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / FILE
    with open(path, "wb") as file:
        file.write(file_of(b"{}", length=length))
        file.truncate(MAX_HEADER + 4096)  # sparse: long enough for the limit itself to be what refuses
    with pytest.raises(CheckpointError, match=r"model-00007.safetensors: truncated or not a safetensors file"):
        read_shard(path)


def test_a_git_lfs_pointer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3087467144\n")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_shard(path)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b" ",
        b"{",
        b"not json",
        b"null",
        b"[]",
        b"3",
        b'"w"',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf" + GOOD,
        b"PK\x03\x04",
        GOOD.decode().encode("utf-16"),
        GOOD + b"}",
        GOOD + b"\0",
        GOOD[:-1] + b"," + GOOD[1:],
        GOOD.replace(b'"shape"', b'"dtype": "F32", "shape"'),
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"w": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda header: f"{len(header)} bytes {bytes(header[:12])!r}",
)
def test_what_is_no_json_object_without_duplicates_is_refused(header: bytes) -> None:
    with pytest.raises(CheckpointError, match=FILE):
        parse(header)


@pytest.mark.parametrize(
    "value",
    [
        *[None, 3, [], "F32", {}, {"dtype": "F32", "shape": [2]}, {"shape": [2], "data_offsets": [0, 8]}],
        *[entry(dtype) for dtype in ("F33", "f32", "", None, 4, ["F32"], {"F32": 1}, "BF16" * 99)],
        *[entry(shape=shape) for shape in (None, 2, "2", [2.0], [True, 2], [-2], [-2, -1], [2**63], [None], {"2": 2})],
        *[entry(shape=shape) for shape in ([1] * 65, [2**62] * 2, [2**62] * 17, [2**62] * 64, [3], [], [0], [1, 1])],
        *[entry(offsets=offsets) for offsets in (None, 8, "08", [], [0], [0, 8, 8], [0, 8.0], [False, 8], [0, True])],
        *[
            entry(offsets=offsets)
            for offsets in ([-8, 0], [8, 0], [0, -8], [0, 2**63], [2**63, 2**63 + 8], [0, 2**200])
        ],
        *[entry(offsets=offsets) for offsets in ([0, 7], [0, 9], [1, 9], [8, 16], [2**62, 2**62 + 8], [0.0, 8e0])],
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_malformed_entry_is_refused_by_the_name_of_its_tensor(value: object) -> None:
    with pytest.raises(CheckpointError, match=f"^{FILE}: .*tensor w: |^{FILE}: truncated: 16 bytes") as error:
        parse({"w": value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("offsets", "says"),
    [
        (((0, 8), (4, 12)), "overlap"),
        (((0, 8), (0, 8)), "overlap"),
        (((0, 8), (12, 20)), "leave a gap"),
        (((4, 12), (12, 20)), "does not begin where the header ends"),
    ],
)
def test_tensors_that_overlap_or_leave_gaps_are_refused(offsets: tuple[tuple[int, int], ...], says: str) -> None:
    header = {f"w{i}": entry(offsets=place) for i, place in enumerate(offsets)}
    with pytest.raises(CheckpointError, match=f"{FILE}: tensors? w[01].*{says}"):
        parse(header, max(end for _, end in offsets))


def test_an_empty_tensor_inside_another_is_refused() -> None:
    with pytest.raises(CheckpointError, match="overlap"):
        parse({"w": entry(), "none": entry(shape=[0], offsets=(4, 4))})


@pytest.mark.parametrize(("body", "says"), [(0, "truncated"), (7, "truncated"), (9, "longer"), (4096, "longer")])
def test_the_tensors_must_fill_the_file_exactly(body: int, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"{FILE}: {says}"):
        parse(GOOD, body)


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": ["pt"], "w": entry()},
        {"__metadata__": "pt", "w": entry()},
        {"__metadata__": 7, "w": entry()},
        {"__metadata__": {"step": 7}, "w": entry()},
        {"__metadata__": {"step": None}, "w": entry()},
        {"\ud800": entry()},
        {"__metadata__": {"note": "\udfff"}, "w": entry()},
    ],
    ids=lambda header: json.dumps(header)[:40],
)
def test_what_no_safetensors_reader_takes_is_refused(header: dict[str, object]) -> None:
    """Such a header would be copied into predictions, which nothing could then open."""
    text = json.dumps(header).encode()
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(file_of(text, bytes(8)))
    with pytest.raises(CheckpointError, match=FILE):
        parse(text)


MANY = {
    "__metadata__": {"format": "pt"},
    "model.embed.weight": entry("BF16", [3, 4], [0, 24]),
    "scale": entry("F32", [], [24, 28]),
    "none": entry("I64", [0, 5], [28, 28]),
    "packed": entry("F4", [8], [28, 32]),
    "größe": entry("U8", [2, 2, 2], [32, 40]),
}
BODY = bytes(range(40))
FRAGMENTS = [
    *[b"-1", b"1e1", b"0.5", b"true", b"null", b"NaN", b"4611686018427387904", b"18446744073709551616", b"9" * 400],
    *[b"[]", b"{}", b"[[", b"}}", b'"', b"\\", b"\\ud800", b"\xff", b"\0", b",", b":", b"0", b"28", b"0,", b"BF16"],
    *[b"I8", b"F6_E2M3", b'"shape":', b'"none": ', b'"__metadata__": ', b"[4611686018427387904, 4611686018427387904, "],
]


@st.composite
def mutated_headers(draw: st.DrawFn) -> bytes:
    """A valid header with one to three stretches of it replaced by something else."""
    header = json.dumps(MANY, ensure_ascii=False).encode()
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(header)))
        stop = start + draw(st.integers(0, 6))
        header = header[:start] + draw(st.sampled_from(FRAGMENTS) | st.binary(max_size=2)) + header[stop:]
    return header


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(mutated_headers(), st.sampled_from([0, 0, 0, -1, 1, 8]))
def test_a_mutated_header_is_refused_or_read_as_the_library_reads_it(header: bytes, more: int) -> None:
    raw = file_of(header, BODY[: len(BODY) + more] if more <= 0 else BODY + bytes(more))
    try:
        found = parse_header(header, len(raw), FILE)
    except CheckpointError as error:
        assert FILE in str(error)
        return
    try:
        theirs = library(raw)
    except safetensors.SafetensorError:
        return
    assert {e.name: (e.dtype, e.shape, raw[e.start : e.end]) for e in found} == theirs


@pytest.mark.parametrize("metadata", [{}, None, {"format": "np"}, {"a": "b"}, {"format": "pt"}, {"größe": "é\n"}])
def test_the_header_for_transformers_says_pt_and_keeps_the_rest(metadata: dict[str, str] | None) -> None:
    table = {**MANY, "__metadata__": metadata}
    before = json.dumps(table).encode()
    after = header_for_transformers(before)
    assert json.loads(after) == {**table, "__metadata__": {**(metadata or {}), "format": "pt"}}
    raw = file_of(after, BODY)
    found = parse_header(after, len(raw), FILE)
    shift = len(after) - len(before)
    old = parse_header(before, len(file_of(before, BODY)), FILE)
    assert [(e.name, e.start - shift, e.end - shift) for e in found] == [(e.name, e.start, e.end) for e in old]
    assert library(raw).keys() == {e.name for e in found}


def test_a_header_that_says_pt_already_stays_as_it_is() -> None:
    header = json.dumps(MANY, indent=1).encode() + b"   "
    assert header_for_transformers(header) == header


def test_the_header_for_transformers_is_padded_to_eight_bytes() -> None:
    lengths = {len(header_for_transformers(json.dumps({"w" * i: entry()}).encode())) % 8 for i in range(1, 10)}
    assert lengths == {0}


#: Reads a header that is in no file, and says what that took.
MEASURED = """import resource, sys
from pathlib import Path
from relexio.checkpoints.header import read_shard
from relexio.errors import CheckpointError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_shard(Path(sys.argv[1]))
except CheckpointError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)"""


@pytest.mark.parametrize(
    ("body", "entry"),
    [(b'{%s"k":0}', b'"k":0,'), (b'{%s"k":{}}', b'"k":{},'), (b'{"k":[%s0]}', b"0,"), (b'{"k":[%s[]]}', b"[],")],
    ids=["keys", "tables", "numbers", "lists"],
)
def test_a_vast_header_is_refused_before_it_fills_the_memory(tmp_path: Path, body: bytes, entry: bytes) -> None:
    header = body % (entry * (60_000_000 // len(entry)))
    path = tmp_path / FILE
    path.write_bytes(file_of(header))
    done = subprocess.run([sys.executable, "-c", MEASURED, path], capture_output=True, text=True)
    taken, said = done.stdout.split(maxsplit=1)
    assert str(path) in said and "more entries than any model" in said
    assert int(taken) << 10 < 2 * len(header)


def test_as_many_entries_as_the_largest_models_have() -> None:
    many = 400_000
    index = b'{"metadata":{"total_size":1},"weight_map":{%s"k":"a"}}'
    table = b'{"tensors":[%s{}]}'
    for text, entry in (
        (index, b'"k":"model-00001-of-00163.safetensors",'),
        (table, b'{"name":"k","dtype":"BF16","shape":[128,7168,2048],"first":12345678},'),
    ):
        assert loads(text % (entry * many))
