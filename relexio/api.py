"""The Python API: a trajectory, its fits and predictions, as lazy Dask arrays. The command line does the same things."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from dask.delayed import delayed

from relexio.dtypes import NUMPY, to_native
from relexio.engine.blocks import combine_block
from relexio.engine.plan import DEFAULT_MEMORY
from relexio.engine.resources import Resources
from relexio.engine.tiles import Rows, window_tiles
from relexio.errors import RequestError
from relexio.fit.fit import Fit, choose_window, fit
from relexio.loops import dense, increments
from relexio.methods import AUTO, Recipe
from relexio.methods.roles import Choice
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.store.read import TILE, observed
from relexio.store.schema import Block, Tensor
from relexio.store.storage import local
from relexio.store.store import Store
from relexio.verbs.advice import how_far, take_advice
from relexio.verbs.backtest import Judgement, judge
from relexio.verbs.convert import Request, prepare
from relexio.verbs.convert import convert as write
from relexio.verbs.output import Target
from relexio.verbs.predict import predict
from relexio.verbs.restore import restore
from relexio.words import Selection, describe_steps, html_table, parse_size, parse_steps

_log = logging.getLogger("relexio")


def open(path: str | Path) -> "Trajectory":
    """Open a trajectory store: a directory, or a URL for fsspec. Raises MissingError, StoreError or StorageError."""
    return Trajectory(open_store(path))


def convert(
    checkpoints: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    *,
    steps: str | Sequence[int] | None = None,
    replace: str | Sequence[int] | None = None,
    dtype: str = "base",
    memory: int | str = DEFAULT_MEMORY,
    workers: int | None = None,
) -> "Trajectory":
    """Store the step directories below ``checkpoints`` in the trajectory ``out``, as ``relexio convert`` does, and open it.

    A new one needs ``base``, the model before RL. ``steps`` and ``replace``: ``"1:75"``, or steps. What the command prints as
    notes is logged, as warnings of the logger ``relexio``. Raises a RelexioError that names file, tensor and step for what
    cannot be converted as it is, RequestError for a wrong ``dtype``, BudgetError for too little memory.
    """
    chosen, again = _selection(steps), _selection(replace)
    model = None if base is None else local(base)
    request = Request(out, model, local(checkpoints), {}, chosen, again, dtype)
    conversion = prepare(request, Resources(_bytes(memory), workers, "cpu"), silent)
    done = write(conversion, silent)
    for text in (*conversion.notes, *done.notes):
        _log.warning("%s: %s", done.store.shown, text)
    return Trajectory(done.store)


class Trajectory:
    """The base and checkpoints of one training run with their real steps; they are read when needed."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __repr__(self) -> str:
        return f"<Trajectory {self._store.shown}: {len(self.tensors)} tensors, {len(self.steps)} steps>"

    def _repr_html_(self) -> str:
        return html_table([*_about(self._store), ("holds", describe_steps(self.steps))])

    @property
    def path(self) -> str:
        """Where the store is."""
        return self._store.address

    @property
    def steps(self) -> tuple[int, ...]:
        """The stored training steps, ascending."""
        return self._store.steps

    @property
    def tensors(self) -> tuple[str, ...]:
        """Tensor names in the order of the base's files."""
        return tuple(tensor.name for tensor in self._store.tensors)

    def delta(self, name: str) -> da.Array:
        """theta_t - theta_0 of one tensor at every stored step, flattened: float64 [T, d], lazy, in blocks of elements.

        Raises RequestError for an unknown tensor, or one that is not BF16, F16 or F32.
        """
        store, tensor = self._store, self._store.tensor(name)
        if not tensor.kind.is_float:
            raise RequestError(f"tensor {name} is {tensor.dtype}; only BF16, F16 and F32 tensors have deltas")
        parts = [
            da.from_delayed(
                delayed(partial(_delta_block, store, block, place))(),
                (len(self.steps), block.pieces[place].size),
                np.float64,
            )
            for block, place in store.parts[name]
        ]
        return da.concatenate(parts, axis=1) if parts else da.zeros((len(self.steps), 0))

    def checkpoint(self, step: int | None = None) -> "Checkpoint":
        """An observed checkpoint, or the base (None), exactly as it was. Raises RequestError for a step not stored."""
        if step is not None:
            self._store.find(step)
        return Checkpoint(self._store, step)

    def fit(
        self,
        window: str | Sequence[int] | None = None,
        *,
        method: str = AUTO,
        rank: int = 1,
        strength: float = 1.0,
        curve: str = "line",
        refit: int | None = None,
        last: int | None = None,
        weights: str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        others: str = "last",
        solver: str = "auto",
        memory: int | str = DEFAULT_MEMORY,
        workers: int | None = None,
        device: str = "auto",
        device_memory: int | str | None = None,
        scheduler: str | None = None,
    ) -> "TrajectoryFit":
        """Fit a method to a window (``"1:75"`` or steps; all stored steps by default), within ``memory`` bytes.

        ``auto`` is the recipe, and the part of the window, that ``judge`` recommends; the paper's is ``relex``. Raises
        RequestError for a window, rank or method that does not fit and where nothing is recommended, BudgetError for too
        little memory.
        """
        limit = None if device_memory is None else _bytes(device_memory)
        resources = Resources(_bytes(memory), workers, device, limit, scheduler=scheduler)
        recipe = Recipe(method, rank, strength, curve, refit, last, weights)
        farthest: int | None = None
        choice, steps = Choice(tuple(include), tuple(exclude), others), _window(self._store, window)
        if method == AUTO:
            if recipe != Recipe(method):
                raise RequestError(
                    'method="auto" takes rank, strength and the like from the backtest; name a method with them'
                )
            advice = take_advice(self._store, steps, resources, silent)
            recipe, steps, farthest = advice.recipe, advice.window, advice.step
        fitted = fit(self._store, steps, recipe, solver, resources, silent, choice)
        return TrajectoryFit(
            **{f.name: getattr(fitted, f.name) for f in fields(fitted)}, resources=resources, farthest=farthest
        )

    def judge(
        self,
        window: str | Sequence[int] | None = None,
        memory: int | str = DEFAULT_MEMORY,
        *,
        workers: int | None = None,
        scheduler: str | None = None,
    ) -> Judgement:
        """Backtest every method, rank, curve and strength on a window, as ``relexio backtest`` does, on the CPU.

        Raises RequestError for fewer than 3 steps, BudgetError for too little memory.
        """
        resources = Resources(_bytes(memory), workers, "cpu", scheduler=scheduler)
        return judge(self._store, _window(self._store, window), resources, silent)


@dataclass(frozen=True, repr=False)
class TrajectoryFit(Fit):
    """A method fitted to a window of a trajectory, with the resources that predictions may use.

    ``farthest``: how far the backtest of all methods recommends to go, where it chose this one.
    """

    resources: Resources = field(default_factory=Resources)
    farthest: int | None = None

    def _repr_html_(self) -> str:
        return html_table([("trajectory", self.store.shown), *self.rows()])

    def predict(self, step: int | None = None) -> "Prediction":
        """The predicted checkpoint at a step; without one, as far as the backtest of the fit's recipe recommends.

        A mix has no step. Raises RequestError for a step that the method cannot reach, and where nothing is recommended.
        """
        if step is None and self.recipe.way.aims:
            step = self.farthest or how_far(self).step
        return Prediction(self, step)


class _Tensors(Mapping[str, da.Array]):
    """Lazy arrays by tensor name, each in its own shape; bf16 comes as float32, exactly."""

    _store: Store

    def __iter__(self) -> Iterator[str]:
        return iter(tensor.name for tensor in self._store.tensors)

    def __len__(self) -> int:
        return len(self._store.tensors)

    def __getitem__(self, name: str) -> da.Array:
        if name not in set(self):
            raise KeyError(name)
        tensor = self._store.tensor(name)
        return _lazy(self._store, tensor, self._bits(tensor))

    def _bits(self, tensor: Tensor) -> Callable[[Block], np.ndarray]:
        raise NotImplementedError


class Checkpoint(_Tensors):
    """An observed checkpoint, or the base: tensors by name, read when computed."""

    def __init__(self, store: Store, step: int | None) -> None:
        self._store, self.step = store, step

    def __repr__(self) -> str:
        return f"<Checkpoint {self._name} of {self._store.shown}: {len(self)} tensors>"

    def _repr_html_(self) -> str:
        return html_table([*_about(self._store), ("checkpoint", self._name)])

    @property
    def _name(self) -> str:
        return "base" if self.step is None else f"step {self.step}"

    def _bits(self, tensor: Tensor) -> Callable[[Block], np.ndarray]:
        return partial(_observed_block, self._store, self.step)

    def save(self, directory: str | Path, memory: int | str = DEFAULT_MEMORY) -> None:
        """Write it as it was: same shards, bytes and side files. Raises ExistsError if the directory exists."""
        restore(self._store, self.step, local(directory), Resources(_bytes(memory), device="cpu"), silent)


class Prediction(_Tensors):
    """A predicted checkpoint: tensors by name, computed when asked for."""

    def __init__(self, fit: TrajectoryFit, step: int | None) -> None:
        self._fit, self._store, self.step, self._weights = fit, fit.store, step, fit.weights(step)

    def __repr__(self) -> str:
        return f"<Prediction of {self._store.shown}, {self._name}: {self._fit.recipe.label}, {len(self)} tensors>"

    def _repr_html_(self) -> str:
        expected = self._fit.outlook(self.step)
        verdict = [] if expected is None else [("verdict", str(expected))]
        rows = [("trajectory", self._store.shown), *self._fit.rows(), ("predicted", self._name), *verdict]
        return html_table(rows)

    @property
    def _name(self) -> str:
        return "mix" if self.step is None else f"step {self.step}"

    def _bits(self, tensor: Tensor) -> Callable[[Block], np.ndarray]:
        if tensor.name not in self._weights:
            return partial(_observed_block, self._store, self._fit.steps[-1])
        return partial(
            _predicted_block, self._store, self._fit.steps, {tensor.name: self._weights[tensor.name][:, np.newaxis]}
        )

    def save(self, directory: str | Path) -> None:
        """Write the checkpoint as a Hugging Face directory. Raises ExistsError if it exists."""
        predict(self._fit, [Target(self.step, local(directory))], self._fit.resources, silent)


def _about(store: Store) -> list[tuple[str, str]]:
    return [("trajectory", store.shown), ("tensors", str(len(store.tensors)))]


def _window(store: Store, window: str | Sequence[int] | None) -> tuple[int, ...]:
    return choose_window(store, _selection(window))


def _selection(steps: str | Sequence[int] | None) -> Selection | None:
    text = steps if isinstance(steps, str) or steps is None else ",".join(map(str, steps))
    return None if text is None else parse_steps(text)


def _bytes(size: int | str) -> int:
    return parse_size(size) if isinstance(size, str) else size


def _lazy(store: Store, tensor: Tensor, bits: Callable[[Block], np.ndarray]) -> da.Array:
    if tensor.kind.is_float:
        dtype = to_native(np.zeros(0, tensor.kind.bits), tensor.kind).dtype
    else:
        dtype = np.dtype(NUMPY.get(tensor.dtype, "u1"))
    width = tensor.kind.itemsize if tensor.kind.is_float else dtype.itemsize
    parts = [
        da.from_delayed(
            delayed(partial(_native, bits, block, block.pieces[place].span, dtype))(),
            (block.pieces[place].size * tensor.kind.itemsize // width,),
            dtype,
        )
        for block, place in store.parts[tensor.name]
    ]
    flat = da.concatenate(parts) if parts else da.zeros((0,), dtype=dtype)
    return flat.reshape(tensor.shape) if tensor.kind.is_float or tensor.dtype in NUMPY else flat


def _native(bits: Callable[[Block], np.ndarray], block: Block, span: slice, dtype: np.dtype[Any]) -> np.ndarray:
    values = bits(block)[span]
    return to_native(values, block.kind) if block.kind.is_float else values.view(dtype)


def _observed_block(store: Store, step: int | None, block: Block) -> np.ndarray:
    return store.base_bits(block) if step is None else observed(store, block, step)


def _predicted_block(store: Store, steps: tuple[int, ...], weights: dict[str, np.ndarray], block: Block) -> np.ndarray:
    return combine_block(store, steps, weights, 1, TILE, "cpu", block)[0]


def _delta_block(store: Store, block: Block, place: int) -> np.ndarray:
    rows, piece, base = Rows.of(store, store.steps), block.pieces[place], store.base_bits(block)
    result = np.zeros((len(store.steps), piece.size))
    for other, span, moves in window_tiles(store, block, rows, TILE // 4):
        if other == place:
            f = dense(moves, increments(moves, base[span], block.kind), rows.count)
            result[:, span.start - piece.first : span.stop - piece.first] = rows.sum_up(f.T)
    return result
