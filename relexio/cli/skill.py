"""Skill by horizon as columns of a table."""

import click
import numpy as np

from relexio.methods.backtest import Backtest
from relexio.methods.trials import horizon_name


def _horizons(test: Backtest) -> list[int]:
    """The horizons at which a backtest held anything out."""
    return sorted(set(test.horizons.tolist()))


def horizon_heads(test: Backtest) -> str:
    """The heads of the columns of skill by horizon."""
    return "".join(f"{horizon_name(horizon):>7}" for horizon in _horizons(test))


def skill_columns(test: Backtest, skills: np.ndarray) -> str:
    """Skill by horizon as columns."""
    return "".join(f"{_skill(skills[horizon]):>7}" for horizon in _horizons(test))


def _skill(skill: float) -> str:
    if np.isnan(skill):
        return "-"
    return f"{skill:+.2f}" if skill > -99 else "< -99"


def skill_table(test: Backtest, rows: dict[str, np.ndarray], head: str = "") -> None:
    """A table of skill by horizon, a row for each name, on stdout."""
    width = max(map(len, (*rows, head)))
    click.echo(f"{head:<{width}}{horizon_heads(test)}")
    for name, skills in rows.items():
        click.echo(f"{name:<{width}}{skill_columns(test, skills)}")
