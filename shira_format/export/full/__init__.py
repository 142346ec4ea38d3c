"""An adapter and its base as a full checkpoint again."""

from __future__ import annotations

from shira_format.export.full.restore import RestoreReport, shira_to_full

__all__ = ["RestoreReport", "shira_to_full"]
