"""Shorthands over the package for tests: convert a made-up run, fit, predict, with blocks small enough to be many."""

from pathlib import Path

import pytest

from relexio.engine.resources import Resources
from relexio.fit.fit import Fit, choose_window, fit
from relexio.methods import Recipe
from relexio.progress import silent
from relexio.store import schema
from relexio.store.store import Store
from relexio.verbs.convert import Request, convert, prepare
from relexio.verbs.output import Target
from relexio.verbs.predict import predict
from relexio.words import parse_steps
from tests.support.make import Run

CPU = Resources(device="cpu")


def small_blocks(monkeypatch: pytest.MonkeyPatch, block: int, chunk: int = schema.MOVES_CHUNK) -> None:
    """Let new stores have blocks of at most ``block`` elements and chunks of ``chunk`` moves."""
    monkeypatch.setattr("relexio.verbs.convert.request.block_elements", lambda most: block)
    monkeypatch.setattr(schema, "MOVES_CHUNK", chunk)


def store_run(run: Run, out: Path, steps: str | None = None, resources: Resources = CPU) -> Store:
    """Convert a run into a new store, or add to one."""
    base = None if out.exists() else run.base_path
    request = Request(out, base, run.steps_path, {}, parse_steps(steps) if steps else None)
    return convert(prepare(request, resources, silent), silent).store


def fit_run(
    store: Store,
    recipe: Recipe | None = None,
    window: str | None = None,
    solver: str = "gram",
    resources: Resources = CPU,
) -> Fit:
    """Fit a recipe to a window of a store."""
    chosen = choose_window(store, parse_steps(window) if window else None)
    return fit(store, chosen, recipe or Recipe(), solver, resources, silent)


def predict_run(fitted: Fit, step: int | None, out: Path, resources: Resources = CPU) -> Path:
    """Write one predicted checkpoint."""
    predict(fitted, [Target(step, out)], resources, silent)
    return out
