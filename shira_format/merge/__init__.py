"""Merging adapters of one base into one, without a dense tensor; exact combinations; differences.

>>> from shira_format.merge import merge
>>> merge(["a.st", "b.st"], "ab.st", method="ties", weights=[0.7, 0.3]).nnz
2903
"""

from __future__ import annotations

from shira_format.merge.diff import Differences, TensorDifference, diff
from shira_format.merge.methods import METHODS, Method
from shira_format.merge.report import MergedTensor, MergeReport
from shira_format.merge.run import Merge, open_merge
from shira_format.merge.verbs import compose, intersect, invert, merge, subtract

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
