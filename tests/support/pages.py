"""A report page of a made-up run."""

from pathlib import Path

import pytest

from relexio.report.data import Facts
from relexio.report.report import Request, render

vl_convert = pytest.importorskip("vl_convert", reason="needs the extra report")
pytest.importorskip("altair", reason="needs the extra report")

FIGURES = ("skill", "energy", "coefficients", "changed", "spectrum", "thrown", "parts")
HOSTILE = (
    "model.layers.0.</script><script>document.title='taken'</script><!--\u2028&\"'<img src=x onerror=alert(1)>.q_proj"
)
STEPS = tuple(range(1, 25))


def page_of(facts: Facts, pngs: Path | None = None) -> tuple[str, dict[Path, bytes]]:
    """The page, and its pictures."""
    return render(facts, Request(Path("run.html"), pngs, facts.found.window), vl_convert)
