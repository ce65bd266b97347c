"""A report page of a made-up run."""

from pathlib import Path

import pytest

from relexio.report.data import Facts
from relexio.report.report import ReportRequest, render

for package in ("altair", "jinja2", "vl_convert"):
    pytest.importorskip(package, reason="needs the extra report")

from relexio.report import figures  # noqa: E402  it needs them

FIGURES = tuple(figures.FIGURES)
HOSTILE = (
    "model.layers.0.</script><script>document.title='taken'</script><!--\u2028&\"'<img src=x onerror=alert(1)>.q_proj"
)
STEPS = tuple(range(1, 25))


def page_of(facts: Facts, pngs: Path | None = None) -> tuple[str, dict[Path, bytes]]:
    """The page, and its pictures."""
    return render(facts, ReportRequest(Path("run.html"), pngs, facts.findings.window))
