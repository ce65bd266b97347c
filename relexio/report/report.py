"""The order of work of ``report``: look at the outputs, measure, draw, write."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from relexio.atomic import storage_errors, write_new
from relexio.errors import BudgetError, ExistsError, RequestError
from relexio.extrapolate.methods import Recipe
from relexio.findings import Findings, findings
from relexio.inspect import changed_counts, sizes
from relexio.plan import OVERHEAD, show
from relexio.progress import Stages
from relexio.report.data import Facts, default_target
from relexio.resources import Resources
from relexio.shown import stem
from relexio.trajectory.store import Store

_NAMES = ("skill", "energy", "coefficients", "changed", "spectrum", "thrown", "parts")
_PNG_WIDTH, _PNG_SCALE = 760, 2
#: What the drawing library holds, whatever is drawn: a JavaScript engine (measured: 205 to 240 MB).
_DRAWING = 288 << 20
_PNG_FONT = "Liberation Sans, Arial, Helvetica, sans-serif"


@dataclass(frozen=True)
class Request:
    """What to write: ``page`` (HTML), ``pngs`` (a directory, or None), of a window at a rank; ``target``: a step, or None."""

    page: Path
    pngs: Path | None
    window: tuple[int, ...]
    rank: int = 1
    target: int | None = None

    def check(self, store: Store) -> None:
        """Raise ExistsError for an output that is there, RequestError for a rank or target that the window cannot have."""
        for path in (self.page, *self.pictures()):
            if path.exists():
                raise ExistsError(f"{path}: exists; remove it, or give another name")
        Recipe(rank=self.rank).check(self._steps(), [] if self.target is None else [self.target])

    def _steps(self) -> Any:
        import numpy as np

        return np.array(self.window)

    def pictures(self) -> list[Path]:
        """Where figures may be written as pictures."""
        return [self.pngs / f"{name}.png" for name in _NAMES] if self.pngs is not None else []

    def command(self, store: Store) -> str:
        """The command line that makes this report."""
        steps = self.window if len(self.window) <= 2 else ()
        window = ",".join(map(str, steps)) if steps else f"{self.window[0]}:{self.window[-1]}"
        options = [f"--window {window}"]
        options += [f"--rank {self.rank}"] if self.rank != 1 else []
        options += [f"--step {self.target}"] if self.target is not None else []
        options += [f"--png {quote(str(self.pngs))}"] if self.pngs is not None else []
        return f"relexio report {quote(store.shown)} {' '.join(options)} -o {quote(str(self.page))}"


@dataclass(frozen=True)
class Written:
    """What was written: the page with its bytes, pictures, and the target that the coefficients lead to."""

    page: Path
    size: int
    pictures: list[Path]
    target: int


def default_page(address: str) -> Path:
    """``run.html`` for a trajectory ``.../run.zarr``, where the user is."""
    return Path(f"{stem(address) or 'report'}.html")


def report(store: Store, request: Request, resources: Resources, stages: Stages) -> Written:
    """Measure a run and write the page and the pictures.

    Raises ExistsError for an output that is there, RequestError without the extra ``report`` or for what the run cannot
    give, BudgetError for too little memory.
    """
    vl_convert = _library()
    request.check(store)
    needed = resources.held + OVERHEAD + _DRAWING
    if needed > resources.memory:
        raise BudgetError(
            f"--memory {show(resources.memory)} is too small: what draws the figures takes most of the {show(needed)} that a "
            f"report needs; give more"
        )
    found = findings(store, request.window, request.rank, resources, stages)
    facts = gather(found, request)
    text, pictures = render(facts, request, vl_convert)
    data = text.encode()
    _write({**pictures, request.page: data})
    return Written(request.page, len(data), list(pictures), facts.target)


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


def gather(found: Findings, request: Request) -> Facts:
    """Findings, and what else the page tells."""
    target = default_target(found) if request.target is None else request.target
    return Facts(found, sizes(found.store), changed_counts(found.store, found.window), target)


def render(facts: Facts, request: Request, vl_convert: Any) -> tuple[str, dict[Path, bytes]]:
    """The page, and the pictures by their paths."""
    from altair import SCHEMA_VERSION

    from relexio.report.figures import figures
    from relexio.report.page import page
    from relexio.report.theme import config, palettes

    version = ".".join(SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    made, store = figures(facts), facts.found.store
    run = default_page(store.address).stem
    text = page(facts, made, run, request.command(store), vl_convert.javascript_bundle(vl_version=version))
    pictures = {}
    for figure in made if request.pngs is not None else ():
        spec = figure.spec(_PNG_WIDTH)
        if spec is not None and request.pngs is not None:
            spec["title"] = {
                "text": figure.title,
                "subtitle": spec["title"]["text"],
                "fontSize": 17,
                "color": "#1a1d21",
            }
            theme = config("light", _PNG_FONT, palettes(facts.parts)[figure.palette]["light"])
            theme["legend"]["columns"] = max(1, _PNG_WIDTH // figure.column)
            theme["padding"] = 14
            pictures[request.pngs / f"{figure.name}.png"] = vl_convert.vegalite_to_png(
                spec, vl_version=version, scale=_PNG_SCALE, config=theme
            )
    return text, pictures


def _library() -> Any:
    """What draws, if it is installed."""
    try:
        importlib.import_module("altair")
        return importlib.import_module("vl_convert")
    except ImportError as error:
        raise RequestError(f"a report needs Altair and vl-convert ({error}); pip install 'relexio[report]'") from error
