"""Merging adapters of one base into one, without a dense tensor; exact combinations; differences.

>>> from shira_format.merging import merge
>>> merge(["a.st", "b.st"], "ab.st", method="ties", weights=[0.7, 0.3]).nnz
2903
"""

from __future__ import annotations

from shira_format.merging.diff import Differences, TensorDifference, diff
from shira_format.merging.methods import METHODS, Method
from shira_format.merging.report import MergedTensor, MergeReport
from shira_format.merging.run import Merge, open_merge
from shira_format.merging.verbs import compose, intersect, invert, merge, subtract

__all__ = [
    "METHODS",
    "Differences",
    "Merge",
    "MergeReport",
    "MergedTensor",
    "Method",
    "TensorDifference",
    "compose",
    "diff",
    "intersect",
    "invert",
    "merge",
    "open_merge",
    "subtract",
]
