"""The loops over moves: what they read is what was written, sums are float64 sums, and both versions give the same bits."""

from collections.abc import Iterator
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given, settings

from relexio.dtypes import KINDS, Kind, from_float64, nonfinite, to_float64
from relexio.loops import COMPILED, Found, Moves, Stream, plain
from relexio.loops.moves import compared_at_once
from tests.support.moves import (
    FLOATS,
    VERSIONS,
    Case,
    cases,
    each_version,
    found,
    make_states,
    same,
    same_moves,
    streams,
    table,
)

each_float = pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
examples = settings(max_examples=100)


def gram(loops: ModuleType, moves: Moves, bits: np.ndarray, kind: Kind, rows: int) -> np.ndarray:
    """F^T F."""
    total, walk = np.zeros((rows, rows)), loops.Walk([stream_of(loops, moves, rows)], kind, rows)
    walk.gram(bits, len(bits), total)
    walk.finish()
    return total


def predict(
    loops: ModuleType, moves: Moves, bits: np.ndarray, weights: np.ndarray, kind: Kind
) -> tuple[np.ndarray, int]:
    """base + F w, and how many of it are not finite where the base is."""
    results = np.tile(bits, (weights.shape[1], 1))
    walk = loops.Walk([stream_of(loops, moves, len(weights))], kind, len(weights))
    lost = walk.predict(bits, len(bits), weights, results)
    walk.finish()
    return results, lost


def stream_of(loops: ModuleType, moves: Moves, columns: int) -> Stream:
    """A table as one segment."""
    return Stream(columns, iter([loops.pack(moves, columns)[0]]), iter([moves.by]))


def same_found(a: Found, b: Found) -> None:
    assert (a.last, a.lost) == (b.last, b.lost)
    for name in ("when", "by", "changed"):
        same(getattr(a, name), getattr(b, name))


# Bytes.


@each_version
def test_bytes_are_those_of_the_format(loops: ModuleType) -> None:
    """One stays, one moves from 0 to the smallest negative number's neighbour -0, one far away by 2 and then by -3."""
    kind, states = KINDS["bf16"], np.zeros((3, 300), np.uint16)
    states[1:, 0] = 0x8000
    states[1, 200], states[2, 200] = 2, 0x8000
    one = found(loops, states, kind)
    assert one.when.tolist() == [0, 255, 399 - 255, 0], "cells 0, 400, 401"
    assert one.by.tolist() == [1, 4, 5], "-1, 2, -3"
    assert (one.last, one.changed.tolist()) == (401, [2, 2])
    one = found(loops, states, kind, first=1000, before=1)
    assert one.when.tolist() == [255] * (1998 // 255) + [1998 % 255, 255, 399 - 255, 0] and one.last == 2401
    one = found(loops, np.array([[3], [5], [0]], np.uint8), KINDS["raw"], first=255)
    assert one.when.tolist() == [255, 255, 0, 0] and one.by.tolist() == [4, 9], "bytes are numbers modulo 256"


@each_version
@given(case=cases())
@examples
def test_what_is_read_is_what_was_found(loops: ModuleType, case: Case) -> None:
    """In any segments, chunks and tiles: the states come back, and the bytes of all columns in one."""
    rng, whole = case.chance(), found(loops, case.states, case.kind)
    reader = loops.Reader(streams(loops, case, rng), case.kind)
    packed, by, cell, parts = [], [], -1, []
    for first, last in case.cuts(rng, case.size):
        moves = reader.take(last)
        parts.append(found(loops, case.states[:, first:last], case.kind, first, cell))
        when, cell = loops.pack(moves, case.columns, first, cell)
        packed.append(when)
        by.append(moves.by)
        assert cell == parts[-1].last
    reader.finish()
    assert cell == whole.last and (whole.changed == (case.states[1:] != case.states[0]).sum(axis=1)).all()
    bad = nonfinite(case.states, case.kind) if case.kind.is_float else np.zeros(case.states.shape, bool)
    moving = case.states[1:] != case.states[:-1]
    assert whole.lost == ((bad[1:] | bad[:-1]) & moving).sum()
    same(np.concatenate(packed), whole.when)
    same(np.concatenate(by), whole.by)
    same(np.concatenate([one.when for one in parts]), whole.when)
    same(np.concatenate([one.by for one in parts]), whole.by)


@each_version
@given(case=cases())
@examples
def test_any_state_is_that_after_the_moves_before_it(loops: ModuleType, case: Case) -> None:
    """Segment by segment, in any chunks: bits become those of each state."""
    rng = case.chance()
    bits, until, before = case.states[0].copy(), int(rng.integers(0, case.columns + 1)), 0
    for stream in streams(loops, case, rng):
        loops.advance(stream, until - before, case.kind, bits)
        before += stream.columns
    same(bits, case.states[until])


@each_version
def test_a_reader_takes_no_more_chunks_than_it_needs(loops: ModuleType) -> None:
    case = Case(KINDS["bf16"], make_states(KINDS["bf16"], 4, 4000, 0.5, False, np.random.default_rng(1)), 1)
    one, taken = found(loops, case.states, case.kind), [0, 0]

    def pieces(array: np.ndarray, which: int) -> Iterator[np.ndarray]:
        for first in range(0, len(array), 100):
            taken[which] += len(array[first : first + 100])
            yield array[first : first + 100]

    reader = loops.Reader([Stream(4, pieces(one.when, 0), pieces(one.by, 1))], case.kind)
    moves = 0
    for last in range(400, 4001, 400):
        moves += len(reader.take(last).by)
        assert taken[0] <= moves + 200 and taken[1] < moves + 100
    reader.finish()
    assert moves == len(one.by) == taken[1]


@each_version
@pytest.mark.parametrize(("columns", "elements"), [(1, 140_000), (40, 7000), (2500, 150)])
def test_moves_of_many_elements_are_found_in_parts(loops: ModuleType, columns: int, elements: int) -> None:
    """As many as are compared at once, and more, in any parts; moves far from each other too."""
    kind, rng = KINDS["bf16"], np.random.default_rng(3)
    states = make_states(kind, columns, elements, 0.02, False, rng)
    states[:, elements // 2 : -9] = states[0, elements // 2 : -9]
    assert 2 * compared_at_once(states) < elements
    whole, last = found(loops, states, kind), -1
    cells = np.flatnonzero((states[1:] != states[:-1]).T)
    gaps = np.diff(cells, prepend=-1) - 1
    assert bytes(whole.when) == b"".join(b"\xff" * (gap // 255) + bytes([gap % 255]) for gap in gaps.tolist())
    assert whole.last == cells[-1] and len(whole.by) == len(cells)
    parts = []
    for first in range(0, elements, elements // 3):
        part = slice(first, first + elements // 3)
        parts.append(loops.find(states[:, part], states[0, part].copy(), kind, first, last))
        last = parts[-1].last
    assert b"".join(bytes(part.when) for part in parts) == bytes(whole.when)
    same(np.concatenate([part.by for part in parts]), whole.by)
    assert (np.sum([part.changed for part in parts], axis=0) == whole.changed).all()


# Both versions.


@pytest.mark.skipif(not COMPILED, reason="the loops are not compiled")
@given(case=cases())
@example(Case(KINDS["bf16"], np.zeros((2, 0), np.uint16), 0))
@examples
def test_both_versions_give_the_same_bits(case: Case) -> None:
    first, last = VERSIONS
    rng, kind = case.chance(), case.kind
    other = rng.permutation(case.states[-1])
    states = (case.states, other, kind, 5, 4)
    same_found(last.find(*states), first.find(*states))
    differ = (case.states != other).sum(axis=1)
    assert (last.find(*states).changed == differ[1:] - differ[0]).all()
    moves, bits = table(last, case), case.states[0].copy()
    same_moves(moves, table(first, case))
    renamed = np.sort(rng.integers(0, case.columns, case.columns)).astype(np.int32)
    renamed[rng.random(case.columns) < 0.2] = -1
    same_moves(last.fold(moves, renamed, kind), first.fold(moves, renamed, kind))
    if not kind.is_float:
        return
    values = last.increments(moves, bits, kind)
    same(values, first.increments(moves, bits, kind))
    same(last.dense(moves, values, case.columns), first.dense(moves, values, case.columns))
    same(gram(last, moves, bits, kind, case.columns), gram(first, moves, bits, kind, case.columns))
    weights = rng.standard_normal((case.columns, int(rng.integers(1, 11))))
    (results, lost), (wanted, wanted_lost) = (predict(loops, moves, bits, weights, kind) for loops in VERSIONS)
    same(results, wanted)
    assert lost == wanted_lost


@each_version
@given(case=cases(FLOATS))
@example(Case(KINDS["bf16"], np.zeros((2, 0), np.uint16), 0))
@examples
def test_a_walk_gives_the_bits_of_tables(loops: ModuleType, case: Case) -> None:
    """In any segments and chunks, tensor by tensor, with rows of the chain that do not count."""
    rng, kind, bits = case.chance(), case.kind, case.states[0].copy()
    rows = int(rng.integers(1, case.columns + 1))
    kept = np.where(np.arange(case.columns) < rows, np.arange(case.columns), -1).astype(np.int32)
    moves, weights = plain.fold(table(plain, case), kept, kind), rng.standard_normal((rows, int(rng.integers(1, 4))))
    wanted, lost = predict(plain, moves, bits, weights, kind)
    through, results = loops.Walk(streams(plain, case, rng), kind, rows), np.tile(bits, (weights.shape[1], 1))
    for _, last in case.cuts(rng, case.size):
        lost -= through.predict(bits, last, weights, results)
    through.finish()
    same(results, wanted)
    assert lost == 0
    through, total = loops.Walk(streams(plain, case, rng), kind, rows), np.zeros((rows, rows))
    for _, last in case.cuts(rng, case.size):
        through.gram(bits, last, total)
    through.finish()
    same(total, gram(plain, moves, bits, kind, rows))


# Folding.


@each_version
@given(case=cases())
@examples
def test_folded_moves_are_those_between_the_states_that_stay(loops: ModuleType, case: Case) -> None:
    """Columns are forgotten, their moves go to the next that stays; the last ones are cut off."""
    rng = case.chance()
    cut = int(rng.integers(1, case.columns + 1))
    stay = sorted({cut - 1, *map(int, rng.integers(0, cut, 5))})
    renamed = np.full(case.columns, -1, np.int32)
    renamed[:cut] = np.searchsorted(stay, np.arange(cut))
    folded = loops.fold(table(loops, case), renamed, case.kind)
    wanted = found(loops, case.states[[0, *(column + 1 for column in stay)]], case.kind)
    when, last = loops.pack(folded, len(stay))
    same(when, wanted.when)
    same(folded.by, wanted.by)
    assert last == wanted.last


# Arithmetic.


@each_version
@given(case=cases(FLOATS))
@examples
def test_sums_are_those_of_float64(loops: ModuleType, case: Case) -> None:
    """Element by element, move by move."""
    kind, rng, moves = case.kind, case.chance(), table(loops, case)
    weights, base = rng.standard_normal((case.columns, 2)), to_float64(case.states[0], kind)
    values = to_float64(case.states, kind)
    f, grams, sums = np.zeros((case.size, case.columns)), np.zeros((case.columns,) * 2), np.zeros((2, case.size))
    with np.errstate(all="ignore"):
        for e, k in zip(*np.nonzero((case.states[1:] != case.states[:-1]).T), strict=True):
            f[e, k] = values[k + 1, e] - values[k, e]
            sums[:, e] += f[e, k] * weights[k]
        for e in range(case.size):
            rows = moves.row[moves.start[e] : moves.start[e + 1]].astype(int)
            grams[np.ix_(rows, rows)] += np.outer(f[e, rows], f[e, rows])
        total = base + sums
    increments = loops.increments(moves, case.states[0].copy(), kind)
    same(loops.dense(moves, increments, case.columns), f)
    same(gram(loops, moves, case.states[0].copy(), kind, case.columns), grams)
    results, lost = predict(loops, moves, case.states[0].copy(), weights, kind)
    wanted = from_float64(np.where(np.isnan(total), np.nan, total), kind)
    wanted[:, moves.start[1:] == moves.start[:-1]] = case.states[0, moves.start[1:] == moves.start[:-1]]
    same(results, wanted)
    assert lost == (nonfinite(wanted, kind) & ~nonfinite(case.states[0], kind)).sum()


@each_version
def test_pairs_of_many_moves_are_taken_piece_by_piece(loops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(KINDS["f32"], make_states(KINDS["f32"], 30, 200, 0.5, False, np.random.default_rng(3)), 3)
    moves = table(loops, case)
    bits = case.states[0].copy()
    whole = gram(loops, moves, bits, case.kind, 30)
    monkeypatch.setattr(plain, "_PAIRS", 100)
    same(gram(loops, moves, bits, case.kind, 30), whole)


@each_version
@each_float
def test_every_value_is_that_of_its_bits(loops: ModuleType, kind: Kind) -> None:
    """From 0 to each pattern of 16 bits; of those of 32, to the ones that begin so, and end in all ways."""
    bits = np.arange(1, 65536).astype(kind.bits)
    if kind.itemsize == 4:
        bits = (bits << 16) | np.random.default_rng(0).integers(0, 65536, len(bits)).astype(kind.bits)
    one = found(loops, np.stack([np.zeros_like(bits), bits]), kind)
    moves = loops.Reader([Stream(1, iter([one.when]), iter([one.by]))], kind).take(len(bits))
    same(loops.increments(moves, np.zeros_like(bits), kind), to_float64(bits, kind))


@each_version
@each_float
def test_results_are_rounded_once_to_nearest_even(loops: ModuleType, kind: Kind) -> None:
    """All values, the ties between them, what lies beside a tie, and what is too large or too small: as weights of 1."""
    bits = np.sort(np.arange(65536) << (16 if kind.itemsize == 4 else 0)).astype(kind.bits)
    values = to_float64(bits[~nonfinite(bits, kind)], kind)
    above = to_float64((bits + np.dtype(kind.bits).type(1))[~nonfinite(bits, kind)], kind)
    with np.errstate(over="ignore"):
        ties = np.where(np.isfinite(above), (values + above) / 2, values * (1 + 2.0**-12))
    rng = np.random.default_rng(0)
    anything = rng.standard_normal(20_000) * 10.0 ** rng.integers(-50, 45, 20_000)
    edges = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        65504,
        65519.99,
        65520,
        2.0**-24,
        2.0**-25,
        3e38,
        3.5e38,
        2.0**-149,
        5e-324,
    ]
    x = np.concatenate([values, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), anything, edges])
    one = found(loops, np.array([[0], [int(from_float64(np.ones(1), kind)[0])]], kind.bits), kind).by
    for part in np.split(x, range(1 << 16, len(x), 1 << 16)):  # an element moves from 0 to 1 at a row of its own
        n = len(part)
        moves = Moves(np.arange(n + 1), np.arange(n, dtype=np.uint16), np.repeat(one, n))
        results, lost = predict(loops, moves, np.zeros(n, kind.bits), part[:, None], kind)
        wanted = from_float64(part + 0.0, kind)
        same(results[0], wanted)
        assert lost == nonfinite(wanted, kind).sum()


@each_version
@pytest.mark.parametrize(
    ("rank", "n", "m"), [(0, 2, 3), (1, 1, 1), (4, 3, 300), (33, 5, 256), (7, 40, 19), (3, 0, 5), (3, 5, 0)]
)
def test_a_product_is_added_up_as_by_fused_multiply_add(loops: ModuleType, rank: int, n: int, m: int) -> None:
    """Held against exact rationals; and each element is the same in any part of it."""
    rng = np.random.default_rng(rank)
    rows, columns = (rng.standard_normal((rank, size)).astype(np.float32).astype(np.float64) for size in (n, m))
    found = loops.product(rows, columns)
    assert (found.dtype, found.shape) == (np.float32, (n, m))
    for i, j in zip(rng.integers(0, max(n, 1), 40 * (n * m > 0)), rng.integers(0, max(m, 1), 40), strict=False):
        total = np.float32(0)
        for a, b in zip(rows[:, i], columns[:, j], strict=True):
            exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(total))
            near = np.float32(float(exact))
            beside = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)]
            total = min((near, *beside), key=lambda x: abs(Fraction(float(x)) - exact))
        assert found[i, j] == total
        part = loops.product(rows[:, i : i + 1].copy(), columns[:, j : j + 2].copy())
        assert part.tobytes() == found[i : i + 1, j : j + 2].tobytes()


@each_version
@pytest.mark.filterwarnings("error")
def test_a_product_beyond_float32_is_infinite(loops: ModuleType) -> None:
    large = np.full((2, 1), 3e38)
    assert np.isinf(loops.product(large, large)).all()
    assert np.isnan(loops.product(large, np.array([[1e38], [-np.inf]]) * np.array([[1], [1]]))).all()
