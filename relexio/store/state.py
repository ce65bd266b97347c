"""The state of a block in every column of the chain, put together again from its moves, and its digests."""

import hashlib
from collections.abc import Callable, Iterable
from shlex import quote

import numpy as np
from xxhash import xxh3_128

from relexio.dtypes import KINDS
from relexio.errors import StoreError
from relexio.loops import expand
from relexio.store.read import TILE, tiles
from relexio.store.schema import DIGEST, Block
from relexio.store.store import Store

#: Told the place of a piece, the first element of a tile in it, and the element bits [R, w].
See = Callable[[int, int, np.ndarray], None]


def digest_of(bits: np.ndarray) -> bytes:
    """The digest of a block's element bits: XXH3, 128 bits."""
    return xxh3_128(bits.data).digest()


def check_content(store: Store, step: int | None, digests: Iterable[tuple[Block, bytes]]) -> None:
    """Compare the digests of all blocks of a step (None: the base), as they were put together, with its content hash.

    Raises StoreError naming the step, and a tensor whose bits are not those that were hashed.
    """
    order_of = {kind: index for index, kind in enumerate(KINDS)}
    ordered = sorted(digests, key=lambda pair: (order_of[pair[0].kind.name], pair[0].index))
    segment, column = (None, 0) if step is None else store.find(step)
    content = store.base_content if step is None else store.contents[step]
    if hashlib.sha256(b"".join(digest for _, digest in ordered)).hexdigest() == content:
        return
    path = "base" if segment is None else segment.path
    what = f"{store.shown}: {'the base' if step is None else f'step {step}'}"
    advice = (
        f"the store is damaged; relexio verify {quote(store.shown)} lists all damage; take the trajectory from a copy"
    )
    for block, digest in ordered:
        if store.digests(path, block).reshape(-1, DIGEST)[column].tobytes() != digest:
            raise StoreError(f"{what}: {block.names}: not the bits that were hashed; {advice}")
    raise StoreError(f"{what}: its blocks are not those that were committed; {advice}")


def block_states(
    store: Store, block: Block, nbytes: int = TILE, see: See | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Digests [R, 16] of a block in every column, and how many elements of each piece differ from the base: int64 [pieces, R].

    Raises StoreError where chunks are damaged, or moves do not fit each other.
    """
    rows = len(store.steps)
    hashes, changed = [xxh3_128() for _ in range(rows)], np.zeros((len(block.pieces), rows), np.int64)
    base, width = store.base_bits(block), max(64, nbytes // (rows * block.kind.itemsize))
    for place, span, moves in tiles(store, block, width, store.reader(block)):
        bits = expand(moves, rows, base[span], block.kind)
        changed[place] += np.count_nonzero(bits != base[span], axis=1)
        for row, hashed in zip(bits, hashes, strict=True):
            hashed.update(row.data)
        if see is not None:
            see(place, span.start - block.pieces[place].first, bits)
    joined = b"".join(hashed.digest() for hashed in hashes)
    return np.frombuffer(joined, np.uint8).reshape(rows, DIGEST), changed
