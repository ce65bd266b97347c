"""Adapters that are added to a store stand on its base: the bits come from the store, within the memory."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from relexio.checkpoints import product
from relexio.engine import plan
from relexio.progress import silent
from relexio.store.schema import Block
from relexio.store.store import Store
from relexio.verbs.convert import Request, prepare
from relexio.verbs.convert.base import StoredBase
from relexio.verbs.verify import find_originals, verify
from tests.support.adapters import CORPUS, back, merged, run_of, same, store_adapters
from tests.support.make import load_file
from tests.support.steps import CPU, small_blocks


def test_steps_are_added_without_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bits come from the store; blocks end within rows; the hashes are those of a run converted at once."""
    small_blocks(monkeypatch, 128, 64)
    root, later, out = run_of(tmp_path), tmp_path / "later", tmp_path / "run.zarr"
    at_once = store_adapters(tmp_path / "at-once.zarr", root, tmp_path / "base")
    shutil.move(root / "checkpoint-5", later)
    shutil.move(root / "checkpoint-9", tmp_path / "last")
    store_adapters(out, root, tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    store_adapters(out, None, None, s5=later)
    stored = store_adapters(out, None, None, s9=tmp_path / "last")
    assert stored.contents == at_once.contents
    same(back(stored, 9, tmp_path / "back"), merged("whole"))
    assert not verify(stored, find_originals(stored, root, None, {5: later}), CPU, silent).problems
    wrong = verify(stored, find_originals(stored, None, None, {5: tmp_path / "last"}), CPU, silent).problems
    assert wrong and all("differs from what" in text for text in wrong)


def test_any_range_of_the_base_comes_from_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of several blocks, and parts of elements; and a block is decoded once for all who read it."""
    small_blocks(monkeypatch, 64, 64)
    stored = store_adapters(tmp_path / "run.zarr", run_of(tmp_path), tmp_path / "base")
    base, rng = StoredBase(stored), np.random.default_rng(3)
    decoded: list[Block] = []
    real = Store.base_bits

    def count(self: Store, block: Block) -> np.ndarray:
        decoded.append(block)
        return real(self, block)

    monkeypatch.setattr(Store, "base_bits", count)
    for name, array in load_file(CORPUS / "llama-bf16" / "model.safetensors").items():
        for first, last in np.sort(rng.integers(0, array.nbytes + 1, (20, 2))):
            out = bytearray(int(last - first))
            base.read(name, int(first), memoryview(out))
            assert out == array.tobytes()[first:last], (name, first, last)
    decoded.clear()
    with base.held("lm_head.weight", 0, 8) as one, base.held("lm_head.weight", 0, 8) as other:
        for read in (one, other, one):
            read(0, memoryview(bytearray(8)))
    assert len(decoded) == 1


def test_the_memory_for_products_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that for the blocks of a base that comes from the store."""
    root, out, planned = run_of(tmp_path), tmp_path / "run.zarr", []
    need = plan.convert_need

    def note(*given: int) -> plan.Need:
        planned.append(given[4] if len(given) > 4 else 0)
        return need(*given)

    monkeypatch.setattr(plan, "convert_need", note)
    stored = store_adapters(out, root, tmp_path / "base")
    assert planned[0] == product.SCRATCH
    prepare(Request(out, None, None, {12: CORPUS / "plain"}), CPU, silent)
    largest = 3 * max(block.size * block.kind.itemsize for block in stored.blocks)
    assert planned[-1] == product.SCRATCH + largest
    verify(stored, find_originals(stored, root, None), CPU, silent)
    assert planned[-1] == product.SCRATCH + largest
