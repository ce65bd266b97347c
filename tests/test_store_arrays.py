"""The arrays of a store: how they are laid out, and who reads them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from relexio.errors import StoreError
from relexio.store.arrays import block_arrays
from relexio.store.cache import CacheName
from relexio.store.schema import Layout, lay_out
from relexio.store.seal import damage, read_node
from relexio.store.storage import locate
from relexio.store.store import open_store
from tests.support.make import Run, make_run
from tests.support.steps import fit_run, predict_run, store_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, steps=(1, 2, 3), shapes={"model.norm.weight": (24,), "w": (40, 24)})


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
    for path, steps in (("base", 0), ("groups/0000", 3)):
        for kind, arrays in block_arrays(store.tensors, store.block, steps).items():
            for name, layout in arrays.items():
                made = zarr.open_array(tmp_path / "run.zarr" / path / kind / name, mode="r")
                assert (made.shape, made.chunks, made.dtype) == (layout.shape, layout.chunks, layout.dtype)
                assert store.array(f"{path}/{kind}/{name}") == layout


def test_a_store_that_has_moved_knows_its_arrays(run: Run, tmp_path: Path) -> None:
    store = store_run(run, tmp_path / "run.zarr")
    (tmp_path / "run.zarr").rename(tmp_path / "moved.zarr")
    moved = store.moved_to(str(tmp_path / "moved.zarr"))
    assert moved.changed(moved.groups[0]).shape == (2, 3) and moved.absolute == str(tmp_path / "moved.zarr")


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
    tensors = lay_out({"a": ("BF16", (5000,)), "b": ("F32", (3,)), "c": ("BF16", (1,))}, 1024)
    assert [tensor.first_block for tensor in tensors] == [0, 0, 5]
