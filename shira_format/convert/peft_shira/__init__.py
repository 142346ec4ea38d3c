"""Sparse adapters in PEFT's own files, both ways.

PEFT keeps for each adapted ``nn.Linear`` the positions and the values of ``r * (rows + columns)`` entries, which it adds to
the weight: ``shira_indices`` (int32 ``[2, n]``, rows and columns) and ``shira_weight`` (floats ``[n]``). Its Super-Tuning keeps
``supertuning_indices`` (int32 ``[n]``, flat, in any order) and ``supertuning_values``. What it computes, in a base of any dtype,
is ``round(fl(base + value))`` in float32 (float64 in a float64 base), which is what section 4.1 of the format's
specification says of deltas; Super-Tuning rounds the values to the base's dtype first.

``peft_to_shira`` reads both. ``shira_to_peft`` writes the first; what PEFT cannot hold is refused:

* **A count of entries that is not r * (rows + columns)**, with one ``r`` for all layers: ``pad`` adds zeros.
* **A weight that is not 2-D, or not that of an nn.Linear.** A file does not tell modules apart; names of well-known embeddings are
  refused, and with the base at hand also weights whose bias shows them to be ``Conv1D``. PEFT raises for all others.
* **Masks, patches, adapters of pipelines.**
* **Whole tensors that are not all of a module**: ``modules_to_save`` holds whole modules that are not adapted. Tensors of such a
  module that the adapter leaves alone are taken from the base.

A delta in float32 plus the base does not always give the bits of the target. It does where the difference is exact, which is so
where base and target are within a factor of two of each other, and nearly always in 16 bits. The report counts the others.
"""

from __future__ import annotations

from shira_format.convert.peft_shira.read import peft_to_shira

__all__ = ["peft_to_shira"]
