"""Stores changed by someone who makes their hashes right again, so that what lies deeper is asked too."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from relexio.store.arrays import MOVES
from relexio.store.chunks import chunk_key, short_hash
from relexio.store.opening import open_store
from relexio.store.schema import Layout
from relexio.store.seal import read_bound, seal
from relexio.store.storage import locate
from relexio.store.store import Store


def reseal(store: Path) -> None:
    """Make the marker right: the hashes of metadata and of the chunks of what is small, and the copy of the metadata."""
    record = json.loads((store / "zarr.json").read_text())["attributes"]["relexio"]
    nodes: dict[str, Any] = {}
    for hashes in (record["metadata"], *(segment["metadata"] for segment in record["segments"])):
        for path, hashed, node in [*read_bound(locate(store), hashes)]:
            hashes[path] = hashed
            nodes |= {path: node} if node is not None else {}
    (store / "zarr.json").write_bytes(seal(record, nodes))


def rebind(store: Path) -> None:
    """Make all hashes right, those of the chunks of bits and moves too."""
    opened = open_store(store)
    for top in ("base", *(segment.path for segment in opened.segments)):
        for kind, blocks in opened.block_counts.items():
            _rebind(opened, store, f"{top}/{kind}", ("bits",) if top == "base" else MOVES, blocks)
    reseal(store)


def _rebind(opened: Store, store: Path, top: str, names: tuple[str, ...], blocks: int) -> None:
    layouts = [opened.array(f"{top}/{name}") for name in names]
    counts = [layout.shape[0] // layout.chunks[0] // blocks for layout in layouts]
    found = [
        _hash(store / chunk_key(f"{top}/{name}", layout, block * count + number))
        for block in range(blocks)
        for name, layout, count in zip(names, layouts, counts, strict=True)
        for number in range(count)
    ]
    hashes: Layout = opened.array(f"{top}/hashes")
    assert len(found) == hashes.shape[0] == hashes.chunks[0], "more than one chunk of hashes"
    opened.write_chunk(f"{top}/hashes", np.array(found, "<u8"), 0)


def _hash(path: Path) -> int:
    return short_hash(path.read_bytes()) if path.exists() else 0
