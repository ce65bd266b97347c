"""``report``: one page that shows what a run did and what to believe of it, and its figures as pictures.

Importing this package needs nothing beyond relexio; making a report needs the extra ``report``.
"""

from relexio.report.report import ReportFiles, ReportRequest, default_page, report

__all__ = ["ReportFiles", "ReportRequest", "default_page", "report"]
