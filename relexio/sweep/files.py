"""The directory of a sweep: its table, logs, the checkpoint under evaluation, and the best one. One writer at a time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from relexio import atomic
from relexio.checkpoints.write import PROVENANCE
from relexio.errors import ExistsError
from relexio.sweep.table import Sweep, parse
from relexio.words import stem


def default_directory(trajectory: str) -> Path:
    """Where a sweep of a trajectory leaves its results: beside it, or here if it is on object storage."""
    if "://" in trajectory:
        return Path(f"{stem(trajectory)}.sweep")
    path = Path(trajectory)
    return path.with_name(path.name.removesuffix(".zarr") + ".sweep")


@dataclass(frozen=True)
class Directory:
    """A directory with a table, the state of what is done there. One writer at a time."""

    KIND: ClassVar[str]
    TABLE: ClassVar[str]
    top: Path

    @property
    def table(self) -> Path:
        """The state: everything else can be made again from it."""
        return self.top / self.TABLE

    @property
    def logs(self) -> Path:
        """Output of commands."""
        return self.top / "logs"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the directory and hold its lock. Raises BusyError while another process does, StorageError, ExistsError."""
        with atomic.storage_errors(self.top):
            self.check()
            self.top.parent.mkdir(parents=True, exist_ok=True)
            with atomic.locked(self.top, make=True):
                self.logs.mkdir(exist_ok=True)
                yield

    def check(self) -> None:
        """Raise ExistsError where there is something else."""
        if self.table.is_file() or not self.top.exists():
            return
        others = [] if not self.top.is_dir() else [path.name for path in self.top.iterdir()]
        if not self.top.is_dir() or any(name != "logs" and not name.endswith(atomic.PARTIAL) for name in others):
            raise ExistsError(f"{self.top}: exists and is not a {self.KIND} (it has no {self.TABLE}); give another -o")


class Files(Directory):
    """Paths in a sweep's directory, and what is done with them."""

    KIND, TABLE = "sweep", "results.json"

    @property
    def best(self) -> Path:
        """The best checkpoint so far."""
        return self.top / "best"

    def candidate(self, name: str) -> Path:
        """Where a checkpoint is evaluated; a path for each, or an evaluation that caches by path would mix them up."""
        return self.top.absolute() / "candidates" / name

    def log(self, name: str) -> Path:
        """The output of an evaluation."""
        return self.logs / f"{name}.log"

    def load(self) -> Sweep | None:
        """The saved table, if there is one. Raises RequestError for a file that is not a table."""
        return parse(self.table.read_bytes(), str(self.table)) if self.table.is_file() else None

    def save(self, sweep: Sweep) -> None:
        """Put the table in the place of the earlier one, durably; then the same as CSV."""
        staged = atomic.staging(self.table)
        staged.write_text(json.dumps(sweep.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        atomic.sync(staged)
        staged.replace(self.table)
        atomic.sync(self.top)
        copy = self.top / "results.csv"
        atomic.staging(copy).write_text(sweep.to_csv(), encoding="utf-8")
        atomic.staging(copy).replace(copy)

    def clear(self) -> None:
        """Remove what was under evaluation, or left by a sweep that was killed."""
        atomic.remove_tree(self.top / "candidates")
        if self.best.exists():
            atomic.remove_tree(atomic.staging(self.best))

    def best_is(self, facts: dict[str, Any]) -> bool:
        """Whether the best checkpoint is a prediction with these properties."""
        return _is(self.best, facts)

    def take(self, checkpoint: Path) -> None:
        """Make a whole checkpoint the best one; the one before is removed when this one is in its place."""
        before = atomic.staging(self.best)
        if self.best.exists():
            atomic.remove_tree(before)
            self.best.rename(before)
        checkpoint.rename(self.best)
        atomic.sync(self.top)
        atomic.remove_tree(before)


def _is(checkpoint: Path, facts: dict[str, Any]) -> bool:
    try:
        found = json.loads((checkpoint / PROVENANCE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return isinstance(found, dict) and all(found.get(key) == value for key, value in facts.items())
