"""The order of work of ``report``: look at the outputs, measure, draw, write."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np

from relexio.atomic import storage_errors, write_new
from relexio.engine.plan import OVERHEAD
from relexio.engine.resources import Resources
from relexio.errors import BudgetError, ExistsError, RequestError
from relexio.methods import Recipe
from relexio.progress import Stages
from relexio.report.data import Facts, Score, default_target
from relexio.store.store import Store
from relexio.verbs.findings import findings
from relexio.verbs.inspect import sizes
from relexio.words import show, stem

#: What the drawing library holds, whatever is drawn: a JavaScript engine (measured: 205 to 240 MB).
_DRAWING = 288 << 20


@dataclass(frozen=True)
class ReportRequest:
    """What to write: ``page`` (HTML), ``pngs`` (a directory, or None), of a window at a rank; ``target``: a step, or None.

    ``scores``: those of a sweep, if there was one.
    """

    page: Path
    pngs: Path | None
    window: tuple[int, ...]
    rank: int = 1
    target: int | None = None
    scores: tuple[Score, ...] = ()

    def check(self, store: Store) -> None:
        """Raise ExistsError for an output that exists, RequestError for a rank or target that the window cannot have."""
        for path in (self.page, *self.pictures()):
            if path.exists():
                raise ExistsError(f"{path}: exists; remove it, or give another name")
        Recipe(rank=self.rank).check(np.array(self.window), [] if self.target is None else [self.target])

    def pictures(self) -> list[Path]:
        """Where figures may be written as pictures."""
        from relexio.report.figures import FIGURES  # needs the extra

        return [self.pngs / f"{name}.png" for name in FIGURES] if self.pngs is not None else []

    def command(self, store: Store) -> str:
        """The command line that makes this report."""
        window = f"{self.window[0]}:{self.window[-1]}" if len(self.window) > 2 else ",".join(map(str, self.window))
        options = [f"--window {window}"]
        options += [f"--rank {self.rank}"] if self.rank != 1 else []
        options += [f"--step {self.target}"] if self.target is not None else []
        options += [f"--png {quote(str(self.pngs))}"] if self.pngs is not None else []
        return f"relexio report {quote(store.shown)} {' '.join(options)} -o {quote(str(self.page))}"


@dataclass(frozen=True)
class ReportFiles:
    """What was written: the page with its bytes, pictures, and the target that the coefficients lead to."""

    page: Path
    size: int
    pictures: list[Path]
    target: int


def default_page(address: str) -> Path:
    """``run.html`` for a trajectory ``.../run.zarr``, where the user is."""
    return Path(f"{stem(address) or 'report'}.html")


def report(store: Store, request: ReportRequest, resources: Resources, stages: Stages) -> ReportFiles:
    """Measure a run and write the page and the pictures.

    Raises ExistsError for an output that exists, RequestError without the extra ``report`` or for what the run cannot
    give, BudgetError for too little memory.
    """
    if reason := missing():
        raise RequestError(reason)
    request.check(store)
    if reason := too_small(resources):
        raise BudgetError(reason)
    measured = findings(store, request.window, request.rank, resources, stages)
    target = default_target(measured) if request.target is None else request.target
    facts = Facts(measured, sizes(store), store.changed_counts(request.window), target, request.scores)
    text, pictures = render(facts, request)
    page = text.encode()
    _write({**pictures, request.page: page})
    return ReportFiles(request.page, len(page), list(pictures), target)


def _write(files: dict[Path, bytes]) -> None:
    """Write all, or none: what an error leaves would block the same command."""
    written: list[Path] = []
    try:
        for path, data in files.items():
            with storage_errors(path):
                path.absolute().parent.mkdir(parents=True, exist_ok=True)
                write_new(path, data)
            written.append(path)
    except BaseException:  # also Ctrl-C
        for path in written:
            path.unlink(missing_ok=True)
        raise


def render(facts: Facts, request: ReportRequest) -> tuple[str, dict[Path, bytes]]:
    """The page, and the pictures by their paths."""
    from relexio.report.figures import figures  # these need the extra
    from relexio.report.page import page

    drawn, store = figures(facts), facts.findings.store
    text = page(facts, drawn, default_page(store.address).stem, request.command(store))
    figures_to_write = zip(request.pictures(), drawn.values(), strict=False)  # none without a directory for them
    pictures = {path: png for path, figure in figures_to_write if (png := figure.picture(facts.parts)) is not None}
    return text, pictures


def too_small(resources: Resources) -> str | None:
    """Why the memory is not enough to draw; None where it is."""
    needed = resources.held + OVERHEAD + _DRAWING
    if needed <= resources.memory:
        return None
    return (
        f"--memory {show(resources.memory)} is too small: a report needs {show(needed)}, most of it to draw "
        f"the figures; give --memory {-(-needed // 10**6)}MB or more"
    )


def missing() -> str | None:
    """Why no report can be made: the extra ``report`` is not installed. None where it is."""
    try:
        for package in ("altair", "jinja2", "vl_convert"):
            importlib.import_module(package)
    except ImportError as error:
        return f"a report needs Altair and vl-convert ({error}); pip install 'relexio[report]'"
    return None
