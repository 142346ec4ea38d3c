"""Adapters as PEFT's SHiRA; see :mod:`shira_format.convert.peft_shira` for its files.

What PEFT cannot hold is refused:

* **A number of entries other than r * (rows + columns)**, with one ``r`` for all layers: ``pad`` adds zeros.
* **A weight that is not 2-D, or not that of an nn.Linear.** A file does not show the class of a module; names of well-known
  embeddings are refused, and with the base also weights whose bias shows them to be ``Conv1D``. PEFT raises for all others.
* **Masks, patches, adapters of pipelines.**
* **Dense tensors that are not all of a module**: ``modules_to_save`` holds whole modules that are not adapted. Tensors of such a
  module that the adapter does not change are taken from the base.

A delta in float32 plus the base does not always give the bits of the target. It does where the difference is exact: where base
and target are within a factor of two of each other, and nearly always in 16 bits. The report counts the others.
"""

from __future__ import annotations

from shira_format.export.peft_shira.export import PeftReport, PeftTensor, shira_to_peft

__all__ = ["PeftReport", "PeftTensor", "shira_to_peft"]
