"""Check whether a merged checkpoint holds an adapter or a LoRA."""

from shira_analysis.merging.check.check import check_merge
from shira_analysis.merging.check.report import MergeVerdict

__all__ = ["MergeVerdict", "check_merge"]
