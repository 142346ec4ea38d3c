"""Reports on adapters as HTML pages without scripts, network access or other files.

All text from an adapter file is untrusted: it goes through :func:`shira_analysis.reports.html.page.text`, and the page's
content security policy forbids scripts and external resources.
"""

from shira_analysis.reports.html.files import report

__all__ = ["report"]
