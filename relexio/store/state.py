"""The state of a block at every step of a group, put together again from its moves, and its digests."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from shlex import quote

import numpy as np
from xxhash import xxh3_128

from relexio.dtypes import KINDS
from relexio.errors import StoreError
from relexio.store.moves import count_changed, expand
from relexio.store.read import TILE, Cursor
from relexio.store.schema import DIGEST, Block, Group
from relexio.store.store import Store

#: Told the first element and the element bits [K, w] of a tile.
See = Callable[[int, np.ndarray], None]


def digest_of(bits: np.ndarray) -> bytes:
    """The digest of a block's element bits: XXH3, 128 bits."""
    return xxh3_128(bits.data).digest()


def check_content(store: Store, step: int | None, digests: Iterable[tuple[Block, bytes]]) -> None:
    """Compare the digests of all blocks of a step (None: the base), as they were put together, with its content hash.

    Raises StoreError naming the step, and a tensor whose bits are not those that were hashed.
    """
    order = {kind: index for index, kind in enumerate(KINDS)}
    ordered = sorted(digests, key=lambda pair: (order[pair[0].kind.name], pair[0].index))
    group, column = (None, 0) if step is None else store.find(step)
    content = store.base_content if group is None else group.content[column]
    if hashlib.sha256(b"".join(digest for _, digest in ordered)).hexdigest() == content:
        return
    path = "base" if group is None else group.path
    what = f"{store.shown}: {'the base' if step is None else f'step {step}'}"
    advice = (
        f"the store is damaged; relexio verify {quote(store.shown)} lists all damage; take the trajectory from a copy"
    )
    for block, digest in ordered:
        if store.digests(path, block).reshape(-1, DIGEST)[column].tobytes() != digest:
            raise StoreError(f"{what}: tensor {block.tensor.name}: not the bits that were hashed; {advice}")
    raise StoreError(f"{what}: its blocks are not those that were committed; {advice}")


def tile_width(steps: int, itemsize: int, nbytes: int = TILE) -> int:
    """Elements of a block that are worked on at K steps at once: as many as moves can be sorted by, and ``nbytes`` hold."""
    return min(1 << 16, max(64, nbytes // (max(steps, 1) * itemsize)))


def block_state(
    store: Store, group: Group, block: Block, nbytes: int = TILE, see: See | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Digests [K, 16] of a block at every step, and how many of its elements differ from the base: int64 [K].

    Raises StoreError where chunks are damaged, or counts and moves do not fit each other.
    """
    steps = len(group.steps)
    hashes, changed = [xxh3_128() for _ in range(steps)], np.zeros(steps, np.int64)
    for first, bits, counts in _tiles(store, group, block, nbytes):
        changed += counts
        for row, hashed in zip(bits, hashes, strict=True):
            hashed.update(row.data)
        if see is not None:
            see(first, bits)
    joined = b"".join(hashed.digest() for hashed in hashes)
    return np.frombuffer(joined, np.uint8).reshape(steps, DIGEST), changed


def _tiles(store: Store, group: Group, block: Block, nbytes: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    base, count, cursor = store.base_bits(block), store.move_counts(group, block), Cursor(store, group, block)
    steps, tile = len(group.steps), tile_width(len(group.steps), block.kind.itemsize, nbytes)
    for first in range(0, block.size, tile):
        counts = count[first : first + tile]
        elements = np.flatnonzero(counts != 0)
        moves = cursor.take(counts[elements])
        later = np.ones(len(moves.step), bool)
        later[1:] = moves.step[1:] > moves.step[:-1]
        later[moves.first] = True
        if not later.all() or (moves.step >= steps).any():
            raise StoreError(
                f"{store.shown}: {group.path}: moves of tensor {block.tensor.name} are not in the order of time; "
                f"the store is damaged"
            )
        bits = np.repeat(base[None, first : first + tile], steps, axis=0)
        bits[:, elements] ^= expand(moves, steps)
        yield first, bits, count_changed(moves, steps)
