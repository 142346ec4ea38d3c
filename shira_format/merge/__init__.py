"""Joining adapters of one base to one, without ever making a dense tensor.

>>> from shira_format.merge import merge
>>> merge(["a.st", "b.st"], "ab.st", method="ties", weights=[0.7, 0.3]).nnz
2903
"""

from __future__ import annotations

from shira_format.merge.algebra import compose, intersect, invert, subtract
from shira_format.merge.methods import METHODS, Method
from shira_format.merge.report import MergedTensor, MergeReport
from shira_format.merge.run import Merge, merge, merged, open_merge

__all__ = [
    "METHODS",
    "Merge",
    "MergeReport",
    "MergedTensor",
    "Method",
    "compose",
    "intersect",
    "invert",
    "merge",
    "merged",
    "open_merge",
    "subtract",
]
