"""shira-format: sparse high rank adapters as small, exact, checked files.

>>> import shira_format
>>> adapter = shira_format.load("adapter.st")
>>> adapter["encoder.layer.0.attention.self.query.weight"].nnz
1475
"""

from __future__ import annotations

from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch, BaseRequired, FormatError, ShiraError, SourceError, WorkError
from shira_format.format import AdapterFile, AdapterWriter, load, save
from shira_format.tensors import DenseTensor, SparseTensor
from shira_format.version import __version__

__all__ = [
    "Adapter",
    "AdapterFile",
    "AdapterWriter",
    "BaseMismatch",
    "BaseRequired",
    "DenseTensor",
    "FormatError",
    "ShiraError",
    "SourceError",
    "SparseTensor",
    "WorkError",
    "__version__",
    "load",
    "save",
]
