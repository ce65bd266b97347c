"""``report``: one page that shows how a run moved and what to believe about it, and its figures as pictures.

Importing this package needs nothing beyond relexio; making a report needs the extra ``report``.
"""

from relexio.report.data import Score
from relexio.report.report import ReportFiles, ReportRequest, default_page, missing, report

__all__ = ["ReportFiles", "ReportRequest", "Score", "default_page", "missing", "report"]
