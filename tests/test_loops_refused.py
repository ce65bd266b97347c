"""The loops over moves, given damaged bytes or arrays that do not fit: an error says so, and both versions say the same."""

import contextlib
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relexio.dtypes import KINDS
from relexio.loops import COMPILED, Moves, Stream
from tests.support.moves import (
    DAMAGED,
    VERSIONS,
    Case,
    chunks,
    each_version,
    found,
    make_states,
    same,
    same_moves,
    table,
)

BF16 = KINDS["bf16"]


def whole(loops: ModuleType, states: np.ndarray) -> Stream:
    """All moves between states, as one segment."""
    one = found(loops, states, BF16)
    return Stream(len(states) - 1, iter([one.when]), iter([one.by]))


def damaged(parts: list[tuple[bytes, int, int]], seed: int) -> list[Stream]:
    rng, chain = np.random.default_rng(seed), []
    for when, more, columns in parts:
        by = np.arange(seed % 2, more % 3 + sum(byte < 255 for byte in when), dtype=np.uint16)
        chain.append(Stream(columns, chunks(np.frombuffer(when, np.uint8), rng), chunks(by, rng)))
    return chain


def gone_through(loops: ModuleType, parts: list[tuple[bytes, int, int]], seed: int) -> np.ndarray | None:
    """The same of a walk, which gives a Gram matrix."""
    rows, bits = (
        max(1, sum(columns for _, _, columns in parts) - 5),
        np.tile(np.array([0x3C00, 0x8000, 0x7E01], np.uint16), 20),
    )
    walk, total = loops.Walk(damaged(parts, seed), KINDS["f16"], rows), np.zeros((rows, rows))
    try:
        for last in (7, 7, 30, 50):
            walk.gram(bits, last, total)
        walk.finish()
    except ValueError:
        with contextlib.suppress(ValueError):
            walk.predict(bits, 60, np.ones((rows, 1)), np.zeros((1, 60), np.uint16))
        return None
    return total


def outcome(loops: ModuleType, parts: list[tuple[bytes, int, int]], seed: int) -> list[Moves] | None:
    """The tables of damaged streams, or None where that is said; then the reader may be asked again, without harm."""
    reader, tables = loops.Reader(damaged(parts, seed), KINDS["f16"]), []
    try:
        for last in (7, 7, 30, 50):
            tables.append(reader.take(last))
        reader.finish()
    except ValueError:
        with contextlib.suppress(ValueError):
            again = reader.take(60)
            assert again.start[-1] == len(again.row) == len(again.by)
        return None
    return tables


part = st.tuples(st.binary(max_size=60), st.integers(0, 60), st.sampled_from([1, 2, 70]))


@given(st.lists(part, min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=400)
def test_any_bytes_are_a_table_or_an_error(parts: list[tuple[bytes, int, int]], seed: int) -> None:
    results, totals = ([f(loops, parts, seed) for loops in VERSIONS] for f in (outcome, gone_through))
    assert len({result is None for result in (*results, *totals)}) == 1
    for total in totals:
        if total is not None:
            same(total, totals[0])
    for moves, *others, n in zip(*(tables or [] for tables in results), (7, 0, 23, 20), strict=False):
        for other in others:
            same_moves(moves, other)
        assert len(moves.start) == n + 1 and moves.start[0] == 0 and (np.diff(moves.start) >= 0).all()
        assert moves.start[-1] == len(moves.row) == len(moves.by)
        for first, last in pairwise(moves.start):
            rows = moves.row[first:last].astype(int)
            assert (np.diff(rows, prepend=-1) > 0).all() and (rows < sum(columns for _, _, columns in parts)).all()


@each_version
@pytest.mark.parametrize(("when", "by", "text"), DAMAGED)
def test_damage_is_named(loops: ModuleType, when: list[int], by: list[int], text: str) -> None:
    reader = loops.Reader([Stream(2, iter([np.array(when, np.uint8)]), iter([np.array(by, np.uint16)]))], KINDS["bf16"])
    with pytest.raises(ValueError, match=text):
        reader.take(10)
        reader.finish()
    through = loops.Walk([Stream(2, iter([np.array(when, np.uint8)]), iter([np.array(by, np.uint16)]))], BF16, 2)
    with pytest.raises(ValueError, match=text):
        through.gram(np.zeros(10, np.uint16), 10, np.zeros((2, 2)))
        through.finish()
    stream = Stream(2, iter([np.array(when, np.uint8)]), iter([np.array(by, np.uint16)]))
    with pytest.raises(ValueError, match=text):
        loops.advance(stream, 2, KINDS["bf16"], np.zeros(10, np.uint16))


@each_version
def test_nothing_is_taken_of_an_empty_chain(loops: ModuleType) -> None:
    reader = loops.Reader([], KINDS["bf16"])
    moves = reader.take(5)
    reader.finish()
    assert moves.start.tolist() == [0] * 6 and moves.by.dtype == np.uint16
    bits = np.arange(5, dtype=np.uint16)
    results = np.tile(bits, (2, 1))
    walk = loops.Walk([], KINDS["bf16"], 0)
    lost = walk.predict(bits, 5, np.zeros((0, 2)), results)
    walk.finish()
    assert (results == bits).all() and results.shape == (2, 5) and lost == 0


@each_version
def test_chunks_may_lie_anyhow_but_have_the_right_type(loops: ModuleType) -> None:
    when, by = np.array([[3, 9], [0, 9]], np.uint8)[:, 0], np.array([[1, 9], [2, 9]], np.uint16)[:, 0]
    moves = loops.Reader([Stream(2, iter([when]), iter([by]))], KINDS["bf16"]).take(9)
    assert moves.row.tolist() == [1, 0] and moves.by.tolist() == [1, 2] and moves.start[:4].tolist() == [0, 0, 1, 2]
    reader = loops.Reader([Stream(2, iter([when.astype(np.int64)]), iter([by]))], KINDS["bf16"])
    with pytest.raises(TypeError, match="int64, not uint8"):
        reader.take(9)


def walk(loops: ModuleType, states: np.ndarray, bits: np.ndarray, weights: np.ndarray) -> None:
    results = np.zeros((weights.shape[1], len(bits)), np.uint16)
    loops.Walk([whole(loops, states)], BF16, 9).predict(bits.copy(), states.shape[1], weights, results)


Misuse = Callable[[ModuleType, Moves, np.ndarray], object]
MISUSES: dict[str, Misuse] = {
    "few bits to predict": lambda k, moves, states: walk(k, states, states[0, :-1], np.ones((9, 1))),
    "few weights": lambda k, moves, states: walk(k, states, states[0], np.ones((8, 1))),
    "few rows": lambda k, moves, states: k.Walk([whole(k, states)], BF16, 9).gram(
        states[0].copy(), states.shape[1], np.zeros((8, 8))
    ),
    "few bits to advance": lambda k, moves, states: k.advance(whole(k, states), 9, BF16, states[0, :-1].copy()),
    "bits that stay": lambda k, moves, states: k.advance(
        whole(k, states), 9, BF16, np.frombuffer(bytes(2 * states.shape[1]), np.uint16)
    ),
    "few names": lambda k, moves, states: k.fold(moves, np.zeros(8, np.int32), BF16),
    "falling names": lambda k, moves, states: k.fold(moves, np.arange(9, 0, -1, dtype=np.int32), BF16),
    "large names": lambda k, moves, states: k.fold(moves, np.full(9, 1 << 16, np.int32), BF16),
    "few columns": lambda k, moves, states: k.pack(moves, 8),
    "a cell before that is not before": lambda k, moves, states: k.pack(moves, 9, 2, 9 * 400),
    "a cell before that was not": lambda k, moves, states: found(k, states, BF16, 2, 9 * 400),
    "a cell before the first": lambda k, moves, states: found(k, states, BF16, 0, 400),
    "lengths that differ": lambda k, moves, states: k.pack(Moves(moves.start, moves.row[1:], moves.by), 9),
    "no columns": lambda k, moves, states: k.Reader([Stream(0, iter([]), iter([]))], BF16),
    "many columns": lambda k, moves, states: k.Reader([Stream(40_000, iter([]), iter([]))] * 2, BF16),
    "back": lambda k, moves, states: k.Reader([], BF16).take(-1),
}
LAYOUTS: dict[str, Misuse] = {
    "few increments": lambda k, moves, states: k.dense(moves, np.ones(len(moves.by) - 1), 9),
    "turned states": lambda k, moves, states: found(k, np.asfortranarray(states), BF16),
    "states of another type": lambda k, moves, states: found(k, states, KINDS["f32"]),
    "bits of another type": lambda k, moves, states: k.increments(moves, states[0].astype(np.uint32), BF16),
    "bits with gaps": lambda k, moves, states: k.increments(moves, np.repeat(states[0], 2)[::2], BF16),
    "factors of another type": lambda k, moves, states: k.product(np.ones((2, 3), np.float32), np.ones((2, 3))),
    "weights of another type": lambda k, moves, states: walk(k, states, states[0], np.ones((9, 1), int)),
    "elements of a base that are not there": lambda k, moves, states: k.Walk([], BF16, 0).gram(
        states[0].copy(), states.shape[1] + 1, np.zeros((0, 0))
    ),
    "results of another shape": lambda k, moves, states: k.Walk([], BF16, 1).predict(
        states[0].copy(), 0, np.ones((1, 2)), np.zeros((1, states.shape[1]), np.uint16)
    ),
    "names of another type": lambda k, moves, states: k.fold(moves, np.arange(9), BF16),
    "starts of another type": lambda k, moves, states: k.pack(
        Moves(moves.start.astype(np.int32), moves.row, moves.by), 9
    ),
}


@each_version
@pytest.mark.parametrize("misuse", MISUSES)
def test_what_does_not_fit_is_refused(loops: ModuleType, misuse: str) -> None:
    refuse(loops, MISUSES[misuse])


@pytest.mark.skipif(not COMPILED, reason="the loops are not compiled")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_is_as_the_compiled_loops_take_it(layout: str) -> None:
    refuse(VERSIONS[-1], LAYOUTS[layout])


def refuse(loops: ModuleType, misuse: Misuse) -> None:
    case = Case(BF16, make_states(BF16, 9, 100, 0.5, False, np.random.default_rng(4)), 4)
    with pytest.raises(ValueError):
        misuse(loops, table(loops, case), case.states)
