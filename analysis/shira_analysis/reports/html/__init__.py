"""A report on adapters as one HTML page that needs nothing but itself: no network, no scripts, no fonts, no other files.

All that comes from an adapter file is a stranger's text: it goes through :func:`shira_analysis.reports.html.page.text`, and the page's own
content security policy forbids scripts and anything from outside.
"""

from shira_analysis.reports.html.look import Look, look
from shira_analysis.reports.html.report import report

__all__ = ["Look", "look", "report"]
