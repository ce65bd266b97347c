"""The page: one HTML file that needs nothing else. Names come from files, so everything is escaped, and nothing else can run.

page.html is its template, and escapes by default. Two scripts run, and the page's content policy names them by their
hashes: the drawing library and page.js. It allows no request at all.
"""

import base64
import hashlib
from importlib.resources import files
from typing import Any

import vl_convert
from jinja2 import Environment, StrictUndefined

from relexio.methods.verdict import caveat
from relexio.report import words
from relexio.report.chart import VEGA_LITE, Figure
from relexio.report.data import Facts, tensor_rows
from relexio.report.theme import COLOURS, config, palettes
from relexio.version import __version__

_BADGES = {
    "high": "In weights, predictions beat the last checkpoint: high confidence",
    "moderate": "In weights, predictions beat the last checkpoint: moderate confidence",
    "low": "In weights, predictions may beat the last checkpoint: low confidence",
    "none": "Do not extrapolate this run",
    "untested": "Not tested",
}
_COLUMNS = {  # of the table: headings, and the formats of numbers
    "tensor": "", "part": "", "layer": "", "changed": ".1%", "of the energy": ".2%", "energy kept": ".3f", "r²": ".3f",
}  # fmt: skip


def page(facts: Facts, figures: dict[str, Figure], run: str, command: str) -> str:
    """The whole page. ``run`` names the run, ``command`` makes the page again."""
    verdict, rows = words.verdict(facts), tensor_rows(facts.findings)
    library = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]  # its stub wants more
    scripts = [_script(library), _script(_resource("page.js"))]
    return _template().render(
        version=__version__,
        run=run,
        themes=COLOURS,
        style=_resource("page.css"),
        verdict=verdict,
        badge=_BADGES[verdict.sure],
        keys=words.key_figures(facts),
        figures=figures,
        heads=list(_COLUMNS),
        rows=[list(map(_cell, row, _COLUMNS.values())) for row in rows],
        moved=len(facts.findings.tensors),
        caveat=caveat(),
        store=facts.findings.store.shown,
        command=command,
        content=_content(facts, figures),
        scripts=scripts,
        sources=" ".join(map(_source, scripts)),
    )


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.from_string(_resource("page.html"))


def _content(facts: Facts, figures: dict[str, Figure]) -> dict[str, Any]:
    """What page.js draws, and in which colours."""
    drawn = [
        {"name": name, "palette": f.palette, "column": f.column, "signals": f.signals, "spec": spec}
        for name, f in figures.items()
        if (spec := f.spec()) is not None
    ]
    return {"config": {theme: config(theme) for theme in COLOURS}, "palettes": palettes(facts.parts), "figures": drawn}


def _resource(name: str) -> str:
    return files("relexio.report").joinpath(name).read_text(encoding="utf-8")


def _script(text: str) -> str:
    """JavaScript in its element, which it must not end: where it has these at all, they are in strings."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("\r\n", "\n")


def _source(script: str) -> str:
    """How the content policy names a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _cell(value: Any, form: str) -> tuple[str, str | None]:
    """A cell's text, and what it is sorted by where that is not its text."""
    if value is None:
        return "–", "-1"
    return (format(value, form), f"{value:.6g}") if form else (str(value), None)
