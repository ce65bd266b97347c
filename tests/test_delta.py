"""Moves are the XOR bits they came from, and increments add up to the deltas."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from relexio.dtypes import KINDS, to_float64
from relexio.engine.tiles import GroupMoves, Tile, increments
from relexio.store.chunks import decode, encode
from relexio.store.moves import changed, count_changed, expand, find_moves


def some_bits(steps: int, width: int, share: float, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Base bits [n] of finite numbers, and XOR bits [K, n] in which elements keep their bits most of the time."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 0x3F80, width, KINDS[kind].bits)
    xor, now = np.zeros((steps, width), base.dtype), np.zeros(width, base.dtype)
    for row in xor:
        moving = rng.random(width) < share
        now[moving] = rng.integers(0, 4, np.count_nonzero(moving))  # also back to the base's bits
        row[:] = now
    return base, xor


CASES = {
    "steps": st.integers(1, 300),
    "width": st.integers(0, 40),
    "share": st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    "kind": st.sampled_from(["bf16", "f16", "f32"]),
    "seed": st.integers(0, 9),
}


@settings(deadline=None)
@given(**CASES)
def test_moves_are_lossless_and_increments_add_up(steps: int, width: int, share: float, kind: str, seed: int) -> None:
    base, xor = some_bits(steps, width, share, kind, seed)
    elements = changed(xor)
    np.testing.assert_array_equal(elements, np.flatnonzero(xor.any(axis=0)))
    base, xor = base[elements], np.take(xor, elements, axis=1)
    moves = find_moves(xor)
    assert (moves.count > 0).all() and moves.count.sum() == len(moves.step) == len(moves.xor)
    moved = np.count_nonzero(np.diff(xor, axis=0, prepend=np.zeros_like(xor[:1])))
    assert len(moves.step) == (xor.size if 2 * moved > xor.size else moved)
    np.testing.assert_array_equal(expand(moves, steps), xor)
    np.testing.assert_array_equal(count_changed(moves, steps), np.count_nonzero(xor, axis=1))
    found = np.zeros(xor.shape)
    found[moves.step, moves.owner] = increments(moves.xor ^ base[moves.owner], base, moves.first, KINDS[kind])
    want = to_float64(xor ^ base, KINDS[kind]) - to_float64(base, KINDS[kind])
    np.testing.assert_allclose(np.cumsum(found, axis=0), want, rtol=0, atol=1e-15 * np.abs(want).max(initial=1.0))


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


@settings(deadline=None)
@given(
    steps=st.integers(1, 80), groups=st.integers(1, 3), share=st.sampled_from([0.01, 0.1, 1.0]), seed=st.integers(0, 9)
)
def test_every_way_to_the_gram_matrix_is_the_same(steps: int, groups: int, share: float, seed: int) -> None:
    parts, dense, base = [], [], some_bits(1, 300, 0.0, "bf16", seed)[0]
    for group in range(groups):
        xor = some_bits(steps, 300, share, "bf16", seed + group)[1]
        columns = changed(xor)
        moves = find_moves(np.take(xor, columns, axis=1))
        parts.append(GroupMoves(group * steps, steps, columns, moves))
        values = to_float64(xor ^ base, KINDS["bf16"]) - to_float64(base, KINDS["bf16"])
        dense.append(np.diff(values, axis=0, prepend=np.zeros((1, 300))))
    tile = Tile(KINDS["bf16"], np.arange(300), base, tuple(p for p in parts if len(p.elements)), groups * steps)
    f = np.concatenate(dense)
    weights = np.random.default_rng(0).standard_normal((len(f), 2))
    close = {"rtol": 1e-9, "atol": 1e-9 * max(1e-30, np.abs(f).max() ** 2)}
    np.testing.assert_allclose(tile.increments(), f.T, **close)
    np.testing.assert_allclose(tile.gram(), f @ f.T, **close)
    np.testing.assert_allclose(tile.gram(1 << 12), f @ f.T, **close)
    np.testing.assert_allclose(tile.weigh(weights), f.T @ weights, rtol=1e-9, atol=1e-9 * np.abs(f).max())
