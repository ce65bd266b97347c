"""The arrays of a store: how they are laid out, and who reads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from relexio.dtypes import Table
from relexio.errors import StoreError
from relexio.progress import silent
from relexio.store.arrays import block_arrays
from relexio.store.cache import CacheName
from relexio.store.chunks import decode, encode
from relexio.store.opening import open_store
from relexio.store.schema import PIECES, Layout, blocks_of, count_blocks, lay_out
from relexio.store.seal import damage, read_node
from relexio.store.storage import locate
from relexio.verbs.verify import Originals, verify
from tests.support.make import Run, make_run
from tests.support.steps import CPU, fit_run, predict_run, store_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, steps=(1, 2, 3), shapes={"model.norm.weight": (24,), "w": (40, 24)})


def verified(address: Path) -> tuple[str, ...]:
    """What verify finds wrong."""
    return verify(open_store(address), Originals(), CPU, silent).problems


def test_nothing_is_read_through_zarr(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a fit is kept, Zarr is not asked for anything any more."""
    out = tmp_path / "run.zarr"
    store_run(run, out)
    predict_run(fit_run(open_store(out)), 9, tmp_path / "first")

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("opened by Zarr")

    monkeypatch.setattr(zarr, "open_group", never)
    monkeypatch.setattr(zarr.storage.LocalStore, "get", never)
    predict_run(fit_run(open_store(out)), 9, tmp_path / "second")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


def test_arrays_are_laid_out_as_the_table_says(run: Run, tmp_path: Path) -> None:
    """One table is what arrays are made by, and what they are checked against; Zarr sees the same in them."""
    store = store_run(run, tmp_path / "run.zarr")
    for path, steps in (("base", 0), ("segments/0000", 3)):
        for kind, arrays in block_arrays(store.tensors, store.block, steps).items():
            for name, layout in arrays.items():
                made = zarr.open_array(tmp_path / "run.zarr" / path / kind / name, mode="r")
                assert (made.shape, made.chunks, made.dtype) == (layout.shape, layout.chunks, layout.dtype)
                assert store.array(f"{path}/{kind}/{name}") == layout


@pytest.fixture
def shared(run: Run, tmp_path: Path) -> Path:
    """A store with two segments, files of several lengths, and a kept result of each solver."""
    out = tmp_path / "run.zarr"
    for steps in ("1", "2"):
        store_run(run, out, steps)
    for solver in ("gram", "blocks"):
        fit_run(open_store(out), solver=solver)
    return out


def test_a_dimension_has_one_length_in_a_group(shared: Path) -> None:
    """What xarray asks for. Zarr, whose warnings are errors here, knows all that is in a store."""
    lengths: dict[tuple[str, str], set[int]] = {}
    members = dict(zarr.open_group(shared, mode="r", use_consolidated=False).members(max_depth=None))
    for path in members:
        node = json.loads((shared / path / "zarr.json").read_text())
        for name, length in zip(node.get("dimension_names", []), node.get("shape", []), strict=True):
            lengths.setdefault((path.rpartition("/")[0], name), set()).add(length)
    assert {"files", "base/bf16", "segments/0001", "segments/0001/bf16", "cache/gram-0002"} <= {g for g, _ in lengths}
    assert len([path for path in members if path.startswith("cache/blocks")]) == 3
    assert not [group_and_name for group_and_name, found in lengths.items() if len(found) > 1]


def test_the_marker_has_a_copy_of_all_committed_metadata(shared: Path, run: Run) -> None:
    """What Zarr opens a store with is the last commit, whatever has begun since, and is never read by relexio itself."""
    for put in (None, "3"):
        if put is not None:
            store_run(run, shared, put)
        members = dict(zarr.open_group(shared, mode="r").members(max_depth=None))
        assert {*members} == {path for path in open_store(shared).sealed if "/c/" not in path}
        for path, member in members.items():
            assert dict(member.attrs) == json.loads((shared / path / "zarr.json").read_text())["attributes"]
    zarr.create_group(shared / "segments/0009")
    assert {*dict(zarr.open_group(shared, mode="r").members(max_depth=None))} == {*members}


@pytest.mark.parametrize(
    "damage", [(b'"node_type":"array"', b'"node_type":"arraz"'), (b'"kind":"inline"', b'"kind":"inlime"')]
)
def test_a_damaged_copy_of_the_metadata_is_told_and_made_anew(
    shared: Path, run: Run, damage: tuple[bytes, bytes]
) -> None:
    marker, store = shared / "zarr.json", open_store(shared)
    assert not verified(shared) and marker.read_bytes().count(damage[0])
    marker.write_bytes(marker.read_bytes().replace(*damage, 1))
    assert open_store(shared) == store
    (problem,) = verified(shared)
    assert "zarr.json: its consolidated metadata is not what convert wrote" in problem
    assert store_run(run, shared).steps == (1, 2, 3) and not verified(shared)


@pytest.mark.clients
def test_xarray_opens_a_store_and_its_groups(shared: Path) -> None:
    xarray = pytest.importorskip("xarray", reason="needs xarray: pip install -e '.[clients]'")
    store = open_store(shared)
    tree = xarray.open_datatree(shared)
    assert {"/base/bf16", "/segments/0000/bf16", "/segments/0001/bf16", "/files"} <= set(tree.groups)
    segment = xarray.open_zarr(shared, group="segments/0001/bf16", chunks=None)
    assert segment.sizes["column"] == 1
    for block in store.blocks:
        start = block.index * store.block
        bits = tree["base/bf16/bits"].values[start : start + block.size]
        assert bits.dtype == np.uint16 and (bits == store.base_bits(block)).all()
        assert (segment["digest"].values[block.index] == store.digests("segments/0001", block)).all()


def test_a_store_that_zarr_consolidated_is_the_same(shared: Path, run: Run) -> None:
    """What Zarr puts in the place of the copy is not bound and not read; verify tells it, and the next commit replaces it."""
    marker = shared / "zarr.json"
    before, store = marker.read_bytes(), open_store(shared)
    with pytest.warns(zarr.errors.ZarrUserWarning, match="not part in the Zarr format 3"):
        zarr.consolidate_metadata(shared)
    assert marker.read_bytes() != before and open_store(shared) == store and len(verified(shared)) == 1
    consolidated = marker.read_bytes()
    marker.write_bytes(consolidated.replace(store.base_content.encode(), store.contents[1].encode()))
    with pytest.raises(StoreError, match="a checksum is wrong"):
        open_store(shared)
    marker.write_bytes(consolidated)
    assert store_run(run, shared).steps == (1, 2, 3) and not verified(shared)


def test_a_store_that_has_moved_knows_its_arrays(run: Run, tmp_path: Path) -> None:
    store = store_run(run, tmp_path / "run.zarr")
    (tmp_path / "run.zarr").rename(tmp_path / "moved.zarr")
    moved = store.moved_to(str(tmp_path / "moved.zarr"))
    assert moved.changed(moved.segments[0]).shape == (2, 3) and moved.absolute == str(tmp_path / "moved.zarr")


@pytest.mark.parametrize("error", [AttributeError, IndexError, RuntimeError, ZeroDivisionError])
def test_a_mistake_in_the_program_is_not_told_as_damage(error: type[Exception]) -> None:
    with pytest.raises(error), damage("store"):
        raise error("a mistake")


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError])
def test_what_records_cannot_be_is_damage(error: type[Exception]) -> None:
    with pytest.raises(StoreError, match="store: damaged"), damage("store"):
        raise error("not as it was written")


@pytest.mark.parametrize("data", [b"", b"[]", b"1", b'{"attributes": 1}', b"[" * 100_000, b"\xff"])
def test_metadata_that_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "zarr.json").write_bytes(data)
    with pytest.raises(ValueError):
        read_node(locate(tmp_path), ".", None)


def test_names_in_the_cache_are_made_and_read_by_one() -> None:
    names = {"gram-0001": CacheName("gram", 1), f"blocks-0012-rank4-{'ab' * 8}": CacheName("blocks", 12, 4, "ab" * 8)}
    assert {str(name): CacheName.parse(str(name)) for name in names.values()} == names
    for other in ("gram", "gramophone", "gram-", "gram-x-y", "gram-0001-x", "gram-0001.relexio-partial"):
        assert CacheName.parse(other) is None


def test_shapes_without_a_dimension_are_refused() -> None:
    node = {
        "node_type": "array",
        "shape": [],
        "chunk_grid": {"configuration": {"chunk_shape": []}},
        "data_type": "uint8",
        "codecs": [{"name": name} for name in ("bytes", "blosc", "crc32c")],
    }
    with pytest.raises(ValueError, match="a shape is a list of sizes"):
        Layout.from_json(node)
    sizes = {"shape": [4], "chunk_grid": {"configuration": {"chunk_shape": [2]}}}
    assert Layout.from_json(node | sizes) == Layout((4,), (2,), np.dtype("u1"))


def test_tensors_lie_one_after_the_other() -> None:
    table: Table = {
        "a": ("BF16", (5000,)),
        "b": ("F32", (3,)),
        "c": ("BF16", (1,)),
        "d": ("BF16", (0,)),
        "e": ("F32", ()),
    }
    tensors = lay_out(table, 1024)
    assert [tensor.first for tensor in tensors] == [0, 0, 5000, 5001, 3]
    assert count_blocks(tensors, 1024) == {"bf16": 5, "f32": 1}
    *_, shared, last = blocks_of(tensors, 1024)
    assert [(p.tensor.name, p.start, p.size, p.first) for p in shared.pieces] == [("a", 4096, 904, 0), ("c", 0, 1, 904)]
    assert [(p.tensor.name, p.start, p.size, p.first) for p in last.pieces] == [("b", 0, 3, 0), ("e", 0, 1, 3)]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["BF16", "F32", "I64"]), st.integers(0, 70)), max_size=200),
    st.sampled_from([1, 8, 64, 1024]),
)
def test_blocks_hold_each_element_once(shapes: list[tuple[str, int]], block: int) -> None:
    """In order, in no more than so many parts of tensors to a block, and each part where the table says."""
    table: Table = {str(number): (dtype, (size,)) for number, (dtype, size) in enumerate(shapes)}
    tensors = lay_out(table, block)
    assert [tensor.name for tensor in tensors] == list(table)
    blocks = blocks_of(tensors, block)
    held: dict[str, list[tuple[int, int]]] = {name: [] for name in table}
    for one in blocks:
        assert 1 <= len(one.pieces) <= PIECES and one.size <= block
        at = 0
        for piece in one.pieces:
            assert piece.first == at and piece.tensor.kind == one.kind
            assert piece.tensor.first + piece.start == one.index * block + piece.first
            held[piece.tensor.name].append((piece.start, piece.size))
            at += piece.size
    for tensor in tensors:
        starts = [start for start, _ in held[tensor.name]]
        assert starts == [sum(size for _, size in held[tensor.name][:i]) for i in range(len(starts))]
        assert sum(size for _, size in held[tensor.name]) == tensor.size
    for kind, count in count_blocks(tensors, block).items():
        assert [one.index for one in blocks if one.kind.name == kind] == list(range(count))


@settings(deadline=None)
@given(st.sampled_from(["u1", "<u2", "<u4"]), st.integers(1, 5000), st.data())
def test_a_chunk_that_any_bit_of_was_flipped_is_refused(dtype: str, count: int, data: st.DataObject) -> None:
    values = np.random.default_rng(0).integers(0, 5, count).astype(dtype)
    stored = bytearray(encode(values))
    np.testing.assert_array_equal(decode(bytes(stored), values.dtype, count), values)
    bit = data.draw(st.integers(0, 8 * len(stored) - 1))
    stored[bit // 8] ^= 1 << bit % 8
    try:
        decode(bytes(stored), values.dtype, count)
    except ValueError as error:
        assert "checksum" in str(error)
    else:
        raise AssertionError("a flipped bit went unseen")
